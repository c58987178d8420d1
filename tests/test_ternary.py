"""Ternary: the published error and the released code's rounding, what is stored, what training gives back."""

from pathlib import Path

import pytest
import torch
from conftest import random_model, random_system
from counting import CountingSource, counting
from golden_layer import agrees, golden_inputs, golden_linear, output_error
from torch import Tensor, nn

from effbench import models, store
from effbench.data import Data, FileSource, WorldSource
from effbench.errors import UnfitError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.registry import get
from effbench.technique import System
from effbench.toolbox.kernels import compiled
from effbench.toolbox.ternary import (
    TernaryLinear,
    TernaryTraining,
    eight_bits,
    pack_fives,
    rounded_product,
    ternary,
    unpack_fives,
)
from effbench.toolbox.training import Recipe, next_token_loss, train
from effbench.toolbox.walk import matrices

IDS = torch.randint(3, 1000, (2, 48), generator=torch.Generator().manual_seed(5))


def applied(system: System, **options: object) -> System:
    technique = get("bitnet")(**{"steps": 2, "batch_size": 2, "length": 32, **options})
    assert technique.unfit(system) is None
    return technique.apply(system, Data(WorldSource(system.tokenizer), 512, lambda name: pytest.fail(name)))


def logits(system: System) -> Tensor:
    with torch.inference_mode():
        return system.model(input_ids=IDS).logits


@pytest.mark.parametrize("packing", ["2", "1.6"])
def test_plain_rounding_meets_the_published_error_on_the_golden_layer(packing: str) -> None:
    layer = get("bitnet")(packing=packing).layer(golden_linear(), None)
    assert agrees(output_error(layer), "3.12628e-01")
    assert float((layer.trits() == 0).double().mean()) == pytest.approx(0.31293, abs=5e-6)
    assert float(layer.scale) == pytest.approx(0.03936056, rel=1e-5)


def test_of_normal_weights_the_share_that_becomes_zero_is_that_of_the_closed_form() -> None:
    weight = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0)) * 0.3
    assert float((ternary(weight)[0] == 0).double().mean()) == pytest.approx(0.3101, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own compiler
def test_forward_and_gradients_are_those_of_the_released_rounding() -> None:
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    linear, inputs = golden_linear(), golden_inputs()[:64]
    ours = TernaryTraining(linear)
    x, theirs_x = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    weight = linear.weight.detach().clone().requires_grad_()
    with torch.compiler.set_stance("force_eager"):
        expected = nn.functional.linear(ActQuant.apply(theirs_x), WeightQuant.apply(weight))
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-4)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours(x).backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(x.grad, theirs_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, weight.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (33, 7), (1, 5)])
@pytest.mark.parametrize("packing", ["2", "1.6"])
def test_packed_it_computes_what_it_computed_in_training(
    dtype: torch.dtype, rows: int, columns: int, packing: str
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    training = TernaryTraining(linear)
    packed = TernaryLinear.pack(training.weight, training.bias, packing, torch.float32)
    x = torch.randn(2, 9, columns).to(dtype)
    with torch.no_grad():
        near = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(packed(x), training(x), rtol=near, atol=near)
        assert packed(x).dtype == dtype and packed(x).shape == (2, 9, rows)
        plain = rounded_product(x.float(), packed.trits(), packed.scale, packed.bias)
        torch.testing.assert_close(packed(x).float(), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_bfloat16_model_multiplies_packed_codes_by_the_kernel(rows: int) -> None:
    if compiled.kernel() is None:
        pytest.skip(str(compiled.absent()))
    training = TernaryTraining(nn.Linear(96, 64))
    packed = TernaryLinear.pack(training.weight, training.bias, "2", torch.bfloat16)
    plain = TernaryLinear.pack(training.weight, training.bias, "2", torch.float32)
    assert packed.tile and not plain.tile and module_bytes(packed) == module_bytes(plain)
    assert torch.equal(packed.trits(), plain.trits()) and packed.unpacked is None
    x = torch.randn(rows, 96).bfloat16()
    with torch.no_grad():
        found, expected = packed(x), training(x)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        with compiled.switched_off():
            assert "it is switched off" in str(packed.unpacked)
            torch.testing.assert_close(packed(x), found, rtol=1e-2, atol=1e-2)


def test_gradients_pass_through_a_packed_layer_as_in_training() -> None:
    training = TernaryTraining(golden_linear())
    packed = TernaryLinear.pack(training.weight, None, "1.6", torch.float32)
    slopes = []
    for layer in (packed, training):
        x = golden_inputs()[:8].requires_grad_()
        layer(x).square().sum().backward()
        slopes.append(x.grad)
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("count", [1, 4, 5, 6, 242, 1000, 3 * 337])
def test_five_to_a_byte_come_back_as_they_were(count: int) -> None:
    digits = torch.randint(0, 3, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack_fives(digits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count // 5)
    assert torch.equal(unpack_fives(packed, count), digits)


def test_every_byte_of_five_comes_back_as_it_was() -> None:
    everything = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 5).T.contiguous()
    packed = pack_fives(everything)
    assert len(packed.unique()) == 243
    assert torch.equal(unpack_fives(packed, 1215), everything.flatten())


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (7, 11), (64, 33)])
@pytest.mark.parametrize("packing", ["2", "1.6"])
def test_packed_weights_of_any_shape_come_back_as_they_were(rows: int, columns: int, packing: str) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    layer = TernaryLinear.pack(weight, None, packing, torch.float32)
    trits, scale = ternary(weight)
    assert torch.equal(layer.trits().float(), trits) and layer.scale == scale
    assert set(layer.trits().flatten().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize(("packing", "bits"), [("2", 2.0), ("1.6", 1.6)])
def test_a_weight_takes_the_bits_of_the_closed_form(packing: str, bits: float) -> None:
    layer = TernaryLinear.pack(torch.randn(192, 384), torch.zeros(192), packing, torch.bfloat16)
    stored = 8 * module_bytes(layer) / (192 * 384)
    assert stored == pytest.approx(bits + 32 / (192 * 384), rel=1e-3)


def test_inputs_of_nothing_but_zeros_give_zeros() -> None:
    layer = TernaryLinear.pack(torch.zeros(4, 8), None, "2", torch.float32)
    assert torch.equal(layer(torch.zeros(3, 8)), torch.zeros(3, 4))
    assert torch.equal(eight_bits(torch.zeros(2, 3))[0], torch.zeros(2, 3))
    assert layer(torch.zeros(0, 8)).shape == (0, 4)


@pytest.mark.parametrize("packing", ["2", "1.6"])
def test_every_architecture_is_trained_packed_saved_and_loaded(architecture: str, packing: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    found, dense = matrices(system.model), stored_bytes(system)
    weights = sum(linear.weight.numel() for _, linear in found)
    system = applied(system, packing=packing)
    assert matrices(system.model) == [] and not system.model.training
    packed = [module for module in system.model.modules() if isinstance(module, TernaryLinear)]
    assert len(packed) == len(found)
    assert dense - stored_bytes(system) == pytest.approx(weights * (16 - float(packing)) / 8, rel=2e-3)
    assert {p.dtype for p in system.model.parameters()} == {torch.bfloat16}
    store.save(system, tmp_path / "system", "bitnet")
    again = store.load(tmp_path / "system")
    assert torch.equal(logits(again), logits(system)) and stored_bytes(again) == stored_bytes(system)


def test_on_a_real_checkpoint_a_few_steps_take_back_a_third_of_what_rounding_costs(stories: tuple[Path, Path]) -> None:
    """Its stories are few: with ten thousand tokens to train on, no more is to be had in seconds."""
    folder, text = stories
    losses = []
    for options in (None, {"steps": 0}, {"steps": 40, "batch_size": 4, "length": 128}):
        system = models.load(str(folder))
        source = FileSource(text, system.tokenizer)
        if options is not None:
            system = get("bitnet")(**options).apply(system, Data(source, 512, lambda name: pytest.fail(name)))
        total = count = 0.0
        for window in source.evaluation(512, 12).ids:
            ids = torch.from_numpy(window)[None]
            with torch.inference_mode():
                total += float(next_token_loss(system.model(input_ids=ids).logits, ids)) * (len(window) - 1)
            count += len(window) - 1
        losses.append(total / count)
    dense, rounded, trained = losses
    assert rounded - dense > 4
    assert trained - dense < 2 / 3 * (rounded - dense)


def test_embedding_and_head_are_left_as_they_were() -> None:
    dense = random_model("llama")
    system = applied(random_system("llama"))
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        assert torch.equal(system.model.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_training_undoes_most_of_what_rounding_destroys() -> None:
    system = random_system("llama")
    train(system.model, counting(200), next_token_loss, Recipe(200, 5e-3))
    trained = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    (text,) = counting(1, seed=9)
    losses = []
    for options in (None, {"steps": 0}, {"steps": 60, "batch_size": 8, "length": 24}):
        system = random_system("llama")
        system.model.load_state_dict(trained)
        if options is not None:
            data = Data(CountingSource(), 512, lambda name: pytest.fail(name))
            system = get("bitnet")(**options).apply(system, data)
        with torch.inference_mode():
            losses.append(float(next_token_loss(system.model(input_ids=text).logits, text)))
    dense, rounded, recovered = losses
    assert rounded - dense > 0.5
    assert recovered - dense < 0.1 * (rounded - dense)


def test_one_seed_gives_the_same_system_and_another_gives_another() -> None:
    first, again, other = (logits(applied(random_system("gpt2"), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_packed_or_broken_weights_are_unfit_with_a_sentence() -> None:
    system = applied(random_system("llama"), steps=0)
    assert "no plain weight matrix is left" in str(get("bitnet")().unfit(system))
    broken = random_system("llama")
    matrices(broken.model)[0][1].weight.data[0, 0] = torch.nan
    assert "model.layers.0.self_attn.q_proj: it has weights that are not finite" in str(get("bitnet")().unfit(broken))
    with pytest.raises(UnfitError, match="calibration text"):
        get("bitnet")().apply(random_system("llama"), Data(None, 512, lambda name: pytest.fail(name)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"packing": "3"}, "one of 2, 1.6, got 3"), ({"steps": -1}, "got -1"), ({"lr": 0.0}, "strictly .* got 0")],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("bitnet")(**options)
