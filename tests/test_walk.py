"""The walk: what it feeds to each block and each matrix is what the model itself would feed."""

import pytest
import torch
import transformers
from conftest import random_system
from torch import Tensor, nn

from effbench.coverage import ARCHITECTURES
from effbench.errors import UnfitError
from effbench.registry import parse
from effbench.toolbox.inputs import Inputs
from effbench.toolbox.walk import captured_inputs, compress_blocks, walk

IDS = torch.arange(3, 3 + 3 * 20).view(3, 20)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_walking_is_what_the_model_does(architecture: str, attention: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        ARCHITECTURES[architecture](), attn_implementation=attention
    ).eval()
    for block in walk(model, IDS):
        last = block
    with torch.no_grad():
        expected = []
        hook = last.module.register_forward_hook(lambda _, __, output: expected.append(output))
        model(input_ids=IDS)
        hook.remove()
    whole = expected[0][0] if isinstance(expected[0], tuple) else expected[0]
    torch.testing.assert_close(torch.cat(last.hidden), whole, rtol=1e-4, atol=1e-5)


def test_statistics_are_the_same_whether_summed_up_or_computed_from_all() -> None:
    chunks = list(torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(0)))
    kept, summed = Inputs(chunks), Inputs(chunks, only=("gram", "mean_abs", "max_abs"))
    everything = torch.cat(chunks).double()
    assert kept.tokens == summed.tokens == 200 and not summed.chunks
    for inputs in (kept, summed):
        torch.testing.assert_close(inputs.gram.double(), everything.T @ everything, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(inputs.mean_abs.double(), everything.abs().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(inputs.max_abs.double(), everything.abs().amax(0))
    with pytest.raises(ValueError, match="only gram of the inputs were kept; add max_abs to `statistics`"):
        _ = Inputs(chunks, only=("gram",)).max_abs


def test_matrices_that_are_fed_the_same_share_their_inputs_and_come_in_the_order_of_their_calls() -> None:
    block = next(walk(random_system("llama").model, IDS))
    names = block.matrices()
    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    groups = block.groups(names)
    assert groups == [attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    found = block.inputs(names)
    assert len({id(found[name]) for name in attention}) == 1
    assert len({id(inputs) for inputs in found.values()}) == 4
    assert found["mlp.down_proj"].tokens == 60


def test_experts_that_the_first_call_does_not_reach_are_not_taken_for_a_group() -> None:
    block = next(walk(random_system("qwen3_moe").model, torch.full((1, 8), 5)))
    names = block.matrices()
    reached = block.inputs(names)
    idle = [name for name in names if name not in reached]
    assert idle
    assert block.groups(names)[-len(idle) :] == [[name] for name in idle]
    assert block.groups(names, idle_together=True)[-1] == idle


def _halved(linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
    linear.weight.data = linear.weight.data / 2
    return linear


@pytest.mark.parametrize("how", ["compressed", "dense", "sequential"])
def test_what_a_matrix_is_shown_comes_from_the_matrices_that_it_will_stand_behind(how: str) -> None:
    changed, shown = random_system("llama", torch.float32).model, {}

    def layer(linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        shown[linear.weight.data_ptr()] = Inputs.of(inputs).gram
        return _halved(linear, inputs)

    at = {name: m.weight.data_ptr() for name, m in changed.model.layers.named_modules() if isinstance(m, nn.Linear)}
    compress_blocks(changed, layer, IDS, dense_inputs=how == "dense", sequential=how == "sequential")
    behind = random_system("llama", torch.float32).model
    if how != "dense":
        compress_blocks(behind, _halved, None)
    if how == "compressed":  # a block's own matrices are still dense while its inputs are taken
        behind.model.layers[1] = random_system("llama", torch.float32).model.model.layers[1]
    names = [name for name in at if name.startswith("1.")]
    with captured_inputs(behind.model.layers, names) as seen, torch.no_grad():
        for sequence in IDS:
            behind(input_ids=sequence[None])
    for name in names:
        rows = torch.cat([chunk[0] for chunk in seen[name]])
        torch.testing.assert_close(shown[at[name]], rows.T @ rows, rtol=1e-3, atol=1e-5)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model = random_system("llama").model
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    (gptq,) = parse("gptq")
    with pytest.raises(UnfitError, match=r"^model\.layers\.1\.mlp\.gate_proj: its calibration inputs are not all fin"):
        compress_blocks(model, gptq.layer, IDS, statistics=gptq.statistics)  # type: ignore[attr-defined]


def test_a_gram_matrix_wider_than_its_blocks_is_whole_whenever_it_is_read() -> None:
    chunks = torch.randint(-3, 4, (2, 5, 1100), generator=torch.Generator().manual_seed(0)).float()
    inputs, seen = Inputs(only=("gram",)), torch.zeros(1100, 1100)
    for chunk in chunks:
        inputs.add(chunk)
        seen += chunk.T @ chunk
        assert torch.equal(inputs.gram, seen)


def test_some_inputs_are_kept_evenly_spread_however_many_come() -> None:
    chunks = torch.arange(3500.0).view(5, 700, 1)
    kept, every = Inputs(chunks, only=("spread",)), Inputs(chunks)
    assert torch.equal(kept.spread(), chunks.view(-1, 1)[::4]) and kept.tokens == 3500
    assert torch.equal(every.spread(), chunks.view(-1, 1)[::6])
    few = Inputs(chunks[:1, :300], only=("spread",))
    assert torch.equal(few.spread(), chunks[0, :300])
