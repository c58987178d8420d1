"""Structured pruning: what is removed is gone, and what is left says what the whole model would without it."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, calibrated, logits, random_system
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from effbench import models, store
from effbench.coverage import ARCHITECTURES
from effbench.data import Data, WorldSource
from effbench.errors import UnfitError
from effbench.measure.memory import cache_bytes, stored_bytes
from effbench.registry import get, parse
from effbench.technique import System
from effbench.toolbox.decoding import forward
from effbench.toolbox.structure import channels, heads, keep_blocks, keep_units
from effbench.toolbox.walk import as_linear, blocks, is_matrix, matrices


@pytest.mark.parametrize("then", ["fwsvd", "llm_pruner:skip_first=0,skip_last=0,samples=2", "random"])
def test_what_blocks_share_may_be_compressed_further(then: str) -> None:
    system = calibrated(random_system("llama", torch.float32), f"fold:sparsity=0,group_size=2+{then}")
    assert torch.isfinite(logits(system)).all()
    if then == "random":
        zeros = [float((linear.weight == 0).float().mean()) for _, linear in matrices(system.model)]
        assert zeros == pytest.approx([0.5] * len(zeros), abs=0.01)


@pytest.mark.parametrize("then", ["shortgpt", "fold:group_size=1", "distill"])
def test_blocks_of_a_sliced_stream_stay_where_they_are(then: str) -> None:
    system = calibrated(random_system("llama", torch.float32), "slicegpt:sliced=0.25")
    reason = parse(then)[0].unfit(system)
    assert reason is not None and "put this technique before slicegpt" in reason


def test_llm_pruner_without_a_block_to_prune_says_so() -> None:
    reason = parse("llm_pruner:skip_first=1,skip_last=0")[0].unfit(random_system("llama"))
    assert reason == "skip_first=1 and skip_last=0 leave no block to prune"


def module_of(name: str) -> Any:
    """The module that a technique is written in."""
    return __import__("sys").modules[get(name).__module__]


def world(system: System) -> Data:
    return Data(WorldSource(system.tokenizer), 64, load=lambda name: pytest.fail(f"asked for {name}"))


def lively(architecture: str, layers: int = 0) -> System:
    """A random model whose biases and norms are not all 0 and 1, of more blocks if asked."""
    system = random_system(architecture, torch.float32)
    if layers:
        config = copy.deepcopy(system.config)
        config.num_hidden_layers = layers
        if hasattr(config, "layer_types"):
            config.layer_types = [config.layer_types[0]] * layers
        torch.manual_seed(0)
        system = System.dense(type(system.model)(config).eval(), system.tokenizer)
    generator = torch.Generator().manual_seed(1)
    for parameter in system.model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return system


def reloaded(system: System, folder: Path) -> System:
    store.save(system, folder / "system", "pruned")
    return store.load(folder / "system")


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- ShortGPT


def test_influence_is_the_mean_of_each_tokens_cosine_before_the_last_norm(architecture: str) -> None:
    system = lively(architecture, 4)
    ids = world(system).calibration(6, 48)
    states: list[list[torch.Tensor]] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        fed = args[0] if args else kwargs["hidden_states"]
        states.append([fed, output[0] if isinstance(output, tuple) else output])

    for block in blocks(system.model)[1]:
        block.register_forward_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        system.model(input_ids=ids)
    expected = []
    for fed, given in states:
        cosine = (fed * given).sum(-1) / fed.norm(dim=-1) / given.norm(dim=-1)
        expected.append(float(1 - cosine.mean()))
    found = module_of("shortgpt").block_influence(random_copy(system), ids)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(found) > 0.01


def random_copy(system: System) -> nn.Module:
    for block in blocks(system.model)[1]:
        block._forward_hooks.clear()
    return system.model


def test_a_block_that_adds_nothing_has_no_influence_and_goes_first(architecture: str, tmp_path: Path) -> None:
    system = lively(architecture, 4)
    idle = blocks(system.model)[1][2]
    for name in (heads(idle).reader, channels(idle).reader):
        for parameter in idle.get_submodule(name).parameters():
            parameter.data.zero_()
    before, stored, one = logits(system), stored_bytes(system), 4 * parameters(idle)
    one += sum(buffer.nbytes for buffer in idle.buffers())
    ids = world(system).calibration(4, 32)
    assert module_of("shortgpt").block_influence(system.model, ids)[2] == pytest.approx(0, abs=1e-6)
    cached = cache_after(system, 16)
    system = calibrated(system, "shortgpt:sparsity=0.25,samples=4")
    torch.testing.assert_close(logits(system), before, rtol=0, atol=1e-5)
    assert stored_bytes(system) == stored - one
    assert cache_after(system, 16) == cached * 3 // 4
    assert system.config.num_hidden_layers == 3
    assert torch.equal(logits(reloaded(system, tmp_path)), logits(system))


def cache_after(system: System, tokens: int) -> int:
    cache = system.new_cache()
    with torch.inference_mode():
        forward(system.model, torch.arange(3, 3 + tokens)[None], cache, 0)
    return cache_bytes(cache)


def test_no_blocks_removed_changes_nothing(architecture: str) -> None:
    dense = random_system(architecture)
    assert torch.equal(logits(calibrated(dense, "shortgpt:sparsity=0")), logits(random_system(architecture)))


def test_the_flattest_run_is_removed_whole() -> None:
    system = lively("llama", 5)
    for place in (1, 2):
        idle = blocks(system.model)[1][place]
        for name in (heads(idle).reader, channels(idle).reader):
            idle.get_submodule(name).weight.data.mul_(1e-3)
    before = logits(system)
    system = calibrated(system, "shortgpt:sparsity=0.4,criterion=angular,samples=4")
    assert len(blocks(system.model)[1]) == 3
    torch.testing.assert_close(logits(system), before, rtol=0, atol=1e-2)


def test_shares_of_blocks_that_are_none_or_all_are_unfit() -> None:
    system = random_system("llama")
    assert "is not one" in str(get("shortgpt")(sparsity=0.2).unfit(system))
    assert "is all of them" in str(get("shortgpt")(sparsity=0.9).unfit(system))


def test_lists_of_blocks_by_number_are_renumbered() -> None:
    config = ARCHITECTURES["llama4_text"]()
    config.num_hidden_layers, config.moe_layers, config.layer_types = 4, [1, 3], ["full_attention"] * 4
    config.no_rope_layers = [1] * 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    kinds = [type(block.feed_forward) for block in blocks(model)[1]]
    keep_blocks(model, [0, 2, 3])
    assert model.config.moe_layers == [2]
    twin = AutoModelForCausalLM.from_config(model.config)
    assert [type(block.feed_forward) for block in blocks(twin)[1]] == [kinds[place] for place in (0, 2, 3)]


def test_a_block_that_is_what_it_is_by_its_number_cannot_take_anothers_place() -> None:
    config = ARCHITECTURES["qwen3_moe"]()
    config.num_hidden_layers, config.decoder_sparse_step, config.layer_types = 4, 2, ["full_attention"] * 4
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnfitError, match="number makes it what it is"):
        keep_blocks(model, [1, 2, 3])


# --- LLM-Pruner


@pytest.mark.parametrize("architecture", [*FAMILIES, "falcon"])
def test_the_pruned_model_is_the_dense_one_with_the_groups_silenced(architecture: str, tmp_path: Path) -> None:
    dense, system = lively(architecture), lively(architecture)
    kept = {0: (torch.tensor([1]), torch.arange(5, 100)), 1: (torch.tensor([0]), torch.arange(0, 128, 3))}
    for place, chosen in kept.items():
        silent, block = blocks(dense.model)[1][place], blocks(system.model)[1][place]
        for units, places in zip((heads(block), channels(block)), chosen, strict=True):
            gone = torch.ones(units.count, dtype=torch.bool)
            gone[places] = False
            as_linear(silent.get_submodule(units.reader)).weight.data[:, units.columns[gone].flatten()] = 0
            keep_units(block, units, places)
    with torch.inference_mode():
        torch.testing.assert_close(logits(system), logits(dense), rtol=0, atol=2e-6)
    again = reloaded(system, tmp_path)
    assert torch.equal(logits(again), logits(system))
    assert stored_bytes(again) == stored_bytes(system)
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(generated(again, ids), generated(dense, ids))


def generated(system: System, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = system.generate(system, ids, 8).ids
    return found


@pytest.mark.parametrize("importance", ["param_first", "vector"])
def test_importance_is_that_of_gradients_of_the_whole_model(architecture: str, importance: str) -> None:
    system = lively(architecture)
    ids = world(system).calibration(10, 64)
    scores = module_of("llm_pruner").taylor(system.model, ids, vector=importance == "vector")
    assert all(parameter.grad is None for parameter in system.model.parameters())
    system.model(input_ids=ids, labels=ids).loss.backward()
    for block in blocks(system.model)[1]:
        for units in (heads(block), channels(block)):
            found = module_of("llm_pruner").importance(block, units, scores)
            for unit in range(units.count):
                total = 0.0
                places = {name: (0, rows[unit]) for name, rows in units.rows.items()}
                for name, (axis, chosen) in {**places, units.reader: (1, units.columns[unit])}.items():
                    module: Any = block.get_submodule(name)
                    product = module.weight.detach() * module.weight.grad
                    product = product if isinstance(module, nn.Linear) else product.T
                    slices = product.index_select(axis, chosen)
                    total += float((slices.sum(1 - axis) if importance == "vector" else slices).abs().sum())
                assert float(found[unit]) == pytest.approx(total, rel=1e-4)


def test_a_fifth_of_the_blocks_weights_is_gone_from_the_bytes(architecture: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    layers = blocks(system.model)[1]
    stored = stored_bytes(system)
    weights = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    biases = sum(p.numel() for p in layers.parameters() if p.ndim == 1)
    cached = cache_after(system, 16)
    count = heads(layers[0]).count
    system = calibrated(system, "llm_pruner:sparsity=0.25")
    layers = blocks(system.model)[1]
    left = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    lost = biases - sum(p.numel() for p in layers.parameters() if p.ndim == 1)
    assert left == pytest.approx(0.75 * weights, rel=0.005)
    assert stored - stored_bytes(system) == 2 * (weights - left + lost)
    few = heads(layers[0]).count
    assert few < count and cache_after(system, 16) <= cached * few // count + 64  # a sliding cache holds its length
    again = reloaded(system, tmp_path)
    assert torch.equal(logits(again), logits(system)) and stored_bytes(again) == stored_bytes(system)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_a_config_that_can_say_the_smaller_shape_does(architecture: str, tmp_path: Path) -> None:
    system = calibrated(random_system(architecture), "llm_pruner:sparsity=0.25")
    block = blocks(system.model)[1][0]
    assert system.config.num_key_value_heads == heads(block).count == 1
    assert system.config.num_attention_heads == 2
    assert system.config.intermediate_size == channels(block).count
    assert torch.equal(ordinary(system, tmp_path), logits(system))


def ordinary(system: System, folder: Path) -> torch.Tensor:
    """The logits of a saved system that transformers alone has loaded."""
    store.save(system, folder / "system", "pruned")
    model = AutoModelForCausalLM.from_pretrained(folder / "system" / "model", dtype="auto").eval()
    return logits(System.dense(model, AutoTokenizer.from_pretrained(folder / "system")))


def test_fewer_blocks_are_an_ordinary_checkpoint(architecture: str, tmp_path: Path) -> None:
    system = calibrated(random_system(architecture), "shortgpt:sparsity=0.5,samples=4")
    assert torch.equal(ordinary(system, tmp_path), logits(system))


def test_heads_that_no_config_can_count_are_saved_all_the_same(tmp_path: Path) -> None:
    """Three heads of four in a stream 64 wide: transformers refuses a config whose width they do not divide."""
    system = random_system("llama")
    config = copy.deepcopy(system.config)
    config.num_key_value_heads = 4
    torch.manual_seed(0)
    system = System.dense(type(system.model)(config).to(torch.bfloat16).eval(), system.tokenizer)
    system = calibrated(system, "llm_pruner:sparsity=0.25")
    assert {heads(block).count for block in blocks(system.model)[1]} == {3}
    again = reloaded(system, tmp_path)
    assert torch.equal(logits(again), logits(system)) and stored_bytes(again) == stored_bytes(system)


def test_ends_are_left_whole_and_the_rest_makes_up_for_them() -> None:
    system = lively("llama", 16)
    layers = blocks(system.model)[1]
    whole, weights = parameters(layers[0]), parameters(layers)
    layers = blocks(calibrated(system, "llm_pruner").model)[1]
    sizes = [parameters(block) for block in layers]
    assert [size == whole for size in sizes] == [True] * 2 + [False] * 13 + [True]
    assert parameters(layers) == pytest.approx(0.8 * weights, rel=0.005)


def test_what_has_no_heads_to_tell_apart_is_unfit_with_a_reason() -> None:
    system = random_system("llama")
    packed = calibrated(system, "rtn")
    assert "put this technique before" in str(get("llm_pruner")().unfit(packed))
    system = random_system("llama")
    attention = blocks(system.model)[1][0].self_attn
    attention.q_norm = nn.LayerNorm(64)
    assert "spans several heads" in str(get("llm_pruner")().unfit(system))


def test_few_blocks_kept_of_many_are_in_order() -> None:
    model = lively("qwen3", 4).model
    chosen = [blocks(model)[1][place] for place in (0, 3)]
    keep_blocks(model, [0, 3])
    assert list(blocks(model)[1]) == chosen and len(model.config.layer_types) == 2
    assert [block.self_attn.layer_idx for block in chosen] == [0, 1]


# --- the trained family


@pytest.mark.parametrize("name", ["shortgpt", "llm_pruner"])
def test_a_wrong_option_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="sparsity must be"):
        get(name)(sparsity=1.5)


def test_the_chosen_groups_lose_less_than_the_ones_that_matter_most() -> None:
    losses = {}
    for reverse in (False, True):
        system = models.load("ref-1m")
        data = Data(WorldSource(system.tokenizer), 256, load=lambda name: pytest.fail(f"asked for {name}"))
        module = module_of("llm_pruner")
        scores = module.taylor(system.model, data.calibration(10, 64))
        if reverse:
            scores = {key: (-rows, -columns) for key, (rows, columns) in scores.items()}
        with torch.no_grad():
            for block in blocks(system.model)[1]:
                module.prune(block, scores, 0.2)
            ids = torch.from_numpy(WorldSource(system.tokenizer).training(8, 256, 77))
            losses[reverse] = float(system.model(input_ids=ids, labels=ids).loss)
    assert losses[False] < losses[True] - 0.1


def test_unfit_reasons_are_raised_where_attention_is_unknown() -> None:
    with pytest.raises(UnfitError, match="no attention of plain matrices"):
        heads(nn.Sequential(nn.Linear(4, 4)))
    for architecture, why in (("bloom", "a slope .ALiBi."), ("phi3", "heads from the config"), ("mixtral", "experts")):
        assert re.search(why, str(get("llm_pruner")().unfit(random_system(architecture))))


# --- SliceGPT


@pytest.mark.parametrize("architecture", [*FAMILIES, "falcon", "phi3"])
def test_a_stream_that_is_only_turned_changes_no_logits(architecture: str, tmp_path: Path) -> None:
    system = lively(architecture, 3)
    before = logits(system)
    ids = torch.arange(3, 15)[None]
    text = generated(system, ids)
    system = calibrated(system, "slicegpt:sliced=0,samples=8")
    torch.testing.assert_close(logits(system), before, rtol=0, atol=1e-4)
    assert torch.equal(generated(system, ids), text)
    again = reloaded(system, tmp_path)
    assert torch.equal(logits(again), logits(system)) and stored_bytes(again) == stored_bytes(system)


def test_directions_that_the_stream_never_takes_are_cut_for_nothing() -> None:
    system = lively("llama", 3)
    mixed, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    for name, parameter in system.model.named_parameters():  # all that writes the stream stays within 40 directions
        if name.endswith("embed_tokens.weight"):
            parameter.data = parameter.data @ mixed[:, :40] @ mixed[:, :40].T
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data = mixed[:, :40] @ mixed[:, :40].T @ parameter.data
    before = logits(system)
    assert (logits(calibrated(lively("llama", 3), "slicegpt:sliced=0.375,samples=8")) - before).abs().max() > 0.01
    system = calibrated(system, "slicegpt:sliced=0.375,samples=8")
    torch.testing.assert_close(logits(system), before, rtol=0, atol=1e-4)


def test_a_cut_stream_is_gone_from_the_bytes(architecture: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    stored, cached = stored_bytes(system), cache_after(system, 16)
    layers = blocks(system.model)[1]
    d, n = 64, 48
    norms = 2 * sum(p.numel() for k, p in layers.named_parameters() if "norm" in k or "ln_" in k)
    norms -= 2 * sum(p.numel() for k, p in layers.named_parameters() if "q_norm" in k or "k_norm" in k)
    readers, writers, new = 0, 0, 0
    for block in layers:
        for units in (heads(block), channels(block)):
            for name in units.rows:
                linear = as_linear(block.get_submodule(name))
                readers += linear.out_features
                has_norm_bias = architecture in ("gpt2", "opt", "gpt_neox")
                new += linear.out_features * (has_norm_bias and linear.bias is None)
            writer = as_linear(block.get_submodule(units.reader))
            writers += writer.in_features + (writer.bias is not None)
    shortcuts = len(layers) * (1 if architecture == "gpt_neox" else 2) * n * n
    ends = 2 * d * n - d  # the last norm's weight went into one of them
    system = calibrated(system, "slicegpt:samples=4")
    assert stored_bytes(system) == stored - norms - 2 * (d - n) * (readers + writers) + 2 * (shortcuts + ends + new)
    assert cache_after(system, 16) == cached
    again = reloaded(system, tmp_path)
    assert torch.equal(logits(again), logits(system)) and stored_bytes(again) == stored_bytes(system)


# --- FoldGPT


def test_groups_of_one_and_no_block_removed_change_nothing(architecture: str) -> None:
    system = calibrated(random_system(architecture), "fold:sparsity=0,group_size=1")
    assert torch.equal(logits(system), logits(random_system(architecture)))


def test_shared_matrices_are_stored_once(architecture: str, tmp_path: Path) -> None:
    dense, system = lively(architecture, 4), lively(architecture, 4)
    stored = stored_bytes(system)
    system = calibrated(system, "fold:sparsity=0,group_size=2")
    layers = blocks(system.model)[1]
    for block, twin in zip(layers, blocks(dense.model)[1], strict=True):
        twin.load_state_dict(block.state_dict())
    assert torch.equal(logits(dense), logits(system))
    matrix = [as_linear(m) for m in layers[0].modules() if is_matrix(m)]
    one = sum(m.weight.nbytes + (0 if m.bias is None else m.bias.nbytes) for m in matrix)
    assert stored_bytes(system) == stored - 2 * one
    again = reloaded(system, tmp_path)
    assert torch.equal(logits(again), logits(system)) and stored_bytes(again) == stored - 2 * one
    weights = (tmp_path / "system" / "model" / "model.safetensors").stat().st_size
    assert stored - 2 * one <= weights < stored - 2 * one + 16384  # the file's header
    assert cache_after(system, 16) == cache_after(dense, 16)


def test_a_block_that_adds_nothing_is_the_one_whose_gate_closes() -> None:
    system = models.load("ref-1m")
    idle = blocks(system.model)[1][1]
    for name in (heads(idle).reader, channels(idle).reader):
        idle.get_submodule(name).weight.data.zero_()
    before = logits(system)
    system = calibrated(system, "fold:sparsity=0.3,group_size=1,steps=8,batch_size=2,length=64")
    assert len(blocks(system.model)[1]) == 2
    torch.testing.assert_close(logits(system), before, rtol=0, atol=1e-5)


def test_recovering_keeps_shared_matrices_shared() -> None:
    system = calibrated(lively("llama", 4), "fold:sparsity=0")
    stored = stored_bytes(system)
    assert stored_bytes(calibrated(system, "recover:steps=2,batch_size=2,length=32")) == stored
