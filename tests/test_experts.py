"""Experts in 3-D tensors: taken apart they compute the same, and each is treated with what is routed to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import logits, random_system
from torch import nn

from effbench import store
from effbench.coverage import ARCHITECTURES, LLAMA
from effbench.errors import UnfitError
from effbench.measure.memory import stored_bytes
from effbench.registry import get
from effbench.technique import System
from effbench.toolbox.experts import ExpertList, expert_slices, unfold
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.walk import blocks, compress_blocks, matrices, walk, weights

MORE: dict[str, Any] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**LLAMA, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        qk_nope_head_dim=16,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2),
}
MIXTURES = ("mixtral", "qwen3_moe", "llama4_text", "gpt_oss", *MORE)


def mixture(name: str, dtype: torch.dtype = torch.float32) -> System:
    torch.manual_seed(0)
    config = {**ARCHITECTURES, **MORE}[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in blocks(model)[1].parameters():
            parameter.normal_(0.1, 0.2)
    return System.dense(model, random_system("llama").tokenizer)


@pytest.mark.parametrize("name", MIXTURES)
def test_taken_apart_they_compute_the_same_from_the_same_memory(name: str) -> None:
    system = mixture(name)
    expected, stored, whole = logits(system), stored_bytes(system), weights(system.model)
    found = matrices(system.model)
    assert any(".experts." in name for name, _ in found)
    assert stored_bytes(system) == stored
    assert [name for name, _ in found] == [name for name, _ in whole]
    assert all(torch.equal(linear.weight, weight) for (_, linear), (_, weight) in zip(found, whole, strict=True))
    assert not any(list(expert_slices(module)) for module in system.model.modules())
    torch.testing.assert_close(logits(system), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_each_expert_sees_the_tokens_routed_to_it_and_no_other(name: str) -> None:
    system = mixture(name)
    ids = torch.arange(3, 83).view(2, 40)
    block = next(walk(system.model, ids))
    router = next(module for module in block.module.modules() if "Router" in type(module).__name__)
    given: list[Any] = []
    handle = router.register_forward_hook(lambda _, args, output: given.append((args[0], output)))
    inputs = block.inputs([name for name in block.matrices() if ".gate_up_proj." in name])
    handle.remove()
    hidden, output = given[0]
    chosen = output[2] if name == "mixtral" else (output[0] > 0).nonzero()[:, 1:]
    assert sum(seen.tokens for seen in inputs.values()) == chosen.numel()
    for expert, seen in inputs.items():
        place = int(expert.rpartition(".")[2])
        rows = hidden.reshape(-1, hidden.shape[-1])[(chosen == place).any(1)]
        if name == "llama4_text":
            rows = rows * output[0][(chosen == place).any(1), place, None]
        torch.testing.assert_close(seen.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "llama4_text", "gpt_oss"])
def test_packed_experts_store_what_their_codes_take_and_survive_saving(name: str, tmp_path: Path) -> None:
    system = mixture(name, torch.bfloat16)
    dense = stored_bytes(system)
    shapes = [tuple(weight.shape) for _, weight in weights(system.model)]
    compress_blocks(system.model, get("rtn")(bits=8, symmetric=True).layer, None)
    # codes of 8 bits and a float16 scale a row, in place of 16 bits a weight
    assert stored_bytes(system) == dense - sum(rows * columns - 2 * rows for rows, columns in shapes)
    store.save(system, tmp_path / "saved", "rtn:bits=8")
    loaded = store.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(system)) and stored_bytes(loaded) == stored_bytes(system)


def test_an_expert_that_no_token_reaches_stays_and_keeps_nothing_else_alive() -> None:
    system = mixture("mixtral", torch.bfloat16)
    router: Any = next(m for m in system.model.modules() if "Router" in type(m).__name__)
    router.weight.data[2] = -100 * torch.ones(64)  # the first block's third expert is never chosen
    with torch.no_grad():
        blocks(system.model)[1][0].post_attention_layernorm.weight.data.abs_()
        system.model.get_input_embeddings().weight.data.abs_()
        for block in walk(system.model, torch.arange(3, 83).view(2, 40)):
            for name, inputs in block.inputs(block.matrices()).items():
                block.replace(name, get("rtn")(bits=8).layer, inputs)
    experts = next(module for module in system.model.modules() if isinstance(module, ExpertList))
    linears: Any = experts.get_submodule("gate_up_proj")
    plain = [place for place, linear in enumerate(linears) if type(linear) is nn.Linear]
    assert 2 in plain and any(isinstance(linear, PackedLinear) for linear in linears)
    assert all(linears[place].weight.untyped_storage().nbytes() == linears[place].weight.nbytes for place in plain)


class Squares(nn.Module):
    """Experts of a kind that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(2, 8, 16))


def test_pruned_experts_store_no_more_than_dense_ones_where_some_are_never_reached() -> None:
    system = random_system("qwen3_moe", torch.float32)
    dense = stored_bytes(system)
    compress_blocks(system.model, get("wanda")().layer, torch.full((1, 8), 5))
    assert stored_bytes(system) <= dense


def test_experts_of_an_unknown_kind_are_refused_with_their_name() -> None:
    with pytest.raises(UnfitError, match="its experts, Squares, compute in a way that is not known"):
        unfold(nn.ModuleList([nn.ModuleList([Squares()])]), transformers.LlamaConfig())


def test_no_class_from_outside_transformers_is_built_from_a_saved_folder() -> None:
    with pytest.raises(ValueError, match="no module of transformers"):
        ExpertList("subprocess:Popen", {"model_type": "llama"}, "up_proj", 1, 8, 8, 8)
