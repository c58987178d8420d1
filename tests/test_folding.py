"""Folding: places for scales are found by what a block computes, and scales in them change nothing."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from effbench.coverage import ARCHITECTURES, LLAMA, VOCABULARY
from effbench.toolbox.folding import Fold, Scaling, find_folds, find_products, fold
from effbench.toolbox.walk import Block, as_linear, walk

MORE: dict[str, Any] = {
    "gemma": lambda: transformers.GemmaConfig(**LLAMA, head_dim=16),
    "phi": lambda: transformers.PhiConfig(**LLAMA),
    "opt, norms behind": lambda: transformers.OPTConfig(
        **VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        do_layer_norm_before=False,
    ),
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = {
    "input_layernorm": QKV,
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
PLACES = {
    "llama": GATED,
    "mistral": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "opt": {
        "self_attn_layer_norm": QKV,
        "self_attn.v_proj": ("self_attn.out_proj",),
        "final_layer_norm": ("fc1",),
        "fc1": ("fc2",),
    },
    "opt, norms behind": {"self_attn.v_proj": ("self_attn.out_proj",), "fc1": ("fc2",)},
    "gpt2": {"ln_1": ("attn.c_attn",), "attn.c_attn": ("attn.c_proj",), "ln_2": ("mlp.c_fc",)},
    "gpt_neox": {
        "input_layernorm": ("attention.query_key_value",),
        "attention.query_key_value": ("attention.dense",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
    "phi": {"input_layernorm": (*QKV, "mlp.fc1"), "self_attn.v_proj": ("self_attn.dense",)},
    "phi3": {
        "input_layernorm": ("self_attn.qkv_proj",),
        "self_attn.qkv_proj": ("self_attn.o_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
        "mlp.gate_up_proj": ("mlp.down_proj",),
    },
    "mixtral": {
        "input_layernorm": QKV,
        "self_attn.v_proj": ("self_attn.o_proj",),
        **{f"mlp.experts.gate_up_proj.{place}": (f"mlp.experts.down_proj.{place}",) for place in range(4)},
    },
}
"""What gives the inputs of which matrices, by the maths of each architecture; GELU lets no scale through."""


def first_block(name: str, dtype: torch.dtype) -> Block:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config({**ARCHITECTURES, **MORE}[name](), dtype=dtype).eval()
    for module in model.modules():  # norms as training would leave them, not all ones
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
            module.weight.data += 0.3 * torch.randn_like(module.weight)
    return next(walk(model, torch.arange(3, 43).view(2, 20)))


def fold_in(block: Block, scales: list[tuple[Fold, torch.Tensor]]) -> Scaling:
    """Fold and put the scaled matrices, which a technique would round, back into the block."""
    scaling = fold(block, scales)
    for name in block.matrices():
        scaled, plain = scaling.linear(block, name), as_linear(block.module.get_submodule(name))
        plain.weight.data.copy_(scaled.weight)
        if plain.bias is not None:
            plain.bias.data.copy_(scaled.bias)
    return scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLACES)
@torch.no_grad()
def test_all_places_are_found_and_no_other(name: str, dtype: torch.dtype) -> None:
    block = first_block(name, dtype)
    before = {key: tensor.clone() for key, tensor in block.module.state_dict().items()}
    assert {place.source: place.readers for place in find_folds(block, heads=4)} == PLACES[name]
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.module.state_dict().items())


@pytest.mark.parametrize("name", PLACES)
@torch.no_grad()
def test_any_scales_folded_everywhere_at_once_change_nothing(name: str) -> None:
    block = first_block(name, torch.float32)
    expected = block.run(0)
    places = find_folds(block, heads=4)
    generator = torch.Generator().manual_seed(1)
    scales = []
    for place in places:
        width = as_linear(block.module.get_submodule(place.readers[0])).in_features
        scales.append((place, place.mean(torch.exp(torch.randn(width, generator=generator)))))
    before = {key: tensor.clone() for key, tensor in block.module.state_dict().items()}
    fold_in(block, scales)
    torch.testing.assert_close(block.run(0), expected, rtol=1e-4, atol=1e-5)
    changed = {
        key.removesuffix(".weight")
        for key, tensor in block.module.state_dict().items()
        if key.endswith(".weight") and not torch.equal(tensor, before[key])
    }
    assert changed == {module for place in places for module in (place.source, *place.readers)}


@torch.no_grad()
def test_readers_make_up_for_the_rounding_of_a_norm() -> None:
    block = first_block("llama", torch.bfloat16)
    place = find_folds(block, heads=4)[0]
    norm = block.module.get_submodule(place.source)
    before = norm.weight.float()
    columns = fold(block, [(place, torch.full((64,), 1.1))]).columns["self_attn.q_proj"]
    assert norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(norm.weight.float() * columns, before, rtol=1e-6, atol=0)
    assert ((columns - 1.1).abs() / 1.1 < 2**-8).all() and (columns != 1.1).any()


@torch.no_grad()
def test_heads_that_share_values_share_a_scale() -> None:
    block = first_block("llama", torch.float32)
    place = next(place for place in find_folds(block, heads=4) if place.source == "self_attn.v_proj")
    assert place.rows is not None
    assert place.rows.view(4, 16).tolist() == [list(range(s, s + 16)) for s in (0, 0, 16, 16)]
    mean = place.mean(torch.arange(64.0)).view(4, 16)
    assert torch.equal(mean[0], mean[1]) and torch.equal(mean[0], torch.arange(8.0, 24.0))


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
@torch.no_grad()
def test_queries_and_keys_are_known_by_what_they_do(name: str) -> None:
    assert {"self_attn.q_proj", "self_attn.k_proj"} <= find_products(first_block(name, torch.bfloat16))
    assert "self_attn.v_proj" not in find_products(first_block(name, torch.bfloat16))
