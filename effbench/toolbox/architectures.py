"""What is known of architectures: where blocks, matrices and norms are, which are fused, which cannot be replaced.

Most is found by structure, so that a model that nobody named here works too. Names are needed where structure does not
tell: which matrices make up attention and feedforward, and how heads lie in fused ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from effbench.errors import UnfitError

ATTENTION = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),
    (("c_attn",), "c_proj"),
    (("query_key_value",), "dense"),
    (("qkv_proj",), "o_proj"),
)
"""Matrices that write heads, and the one that reads them, under the names that models give them. Fused, `c_attn` and
`qkv_proj` have all queries first, then all keys, then all values; `query_key_value` has those of one key head after
the other."""
FEEDFORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
"""Matrices that write channels, and the one that reads them; `gate_up_proj` has all gates first."""
NUMBERED = ("moe_layers", "mlp_only_layers")
"""Lists of a config that hold blocks' numbers; others have an entry for each block."""
READ_DIRECTLY = ("dt_proj",)
"""Matrices that a model reads as tensors and never calls (Mamba's step sizes): no module can take their place."""
FEEDFORWARD_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configs call the number of channels."""


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and their name in the model.

    Found by structure: the module list as long as the config's number of layers that holds the most parameters.
    Raises `UnfitError` where there is none.
    """
    config: Any = model.config
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise UnfitError(f"no list of {depth} decoder blocks was found in a {type(model).__name__}")
    _, name, module = max(found, key=lambda entry: entry[0])
    return name, module


def has_slopes(config: Any) -> bool:
    """Whether attention counts distance in the cache, by a slope for each head that its number gives it (ALiBi)."""
    return config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))


def is_matrix(module: nn.Module) -> bool:
    """Whether this is a plain weight matrix: it computes what `nn.Linear` does, or is GPT-2's transposed `Conv1D`."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    return isinstance(module, nn.Linear) and _multiplies(cast(Any, type(module)))


@cache
def _multiplies(kind: Any) -> bool:
    """Whether a kind of `nn.Linear` with a pass of its own only multiplies and adds, seen on a small one."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        small = kind(3, 2)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = small(x)
            return bool(torch.allclose(found, nn.functional.linear(x, small.weight, small.bias), atol=1e-4))
    except Exception:  # it is built or called in another way, so it is another thing
        return False


def matrix_names(root: nn.Module) -> list[str]:
    """The names within `root` of the plain weight matrices that another module can take the place of."""
    return [
        name
        for name, module in root.named_modules()
        if is_matrix(module) and name.rpartition(".")[2] not in READ_DIRECTLY
    ]


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel and nothing within."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and not list(module.children())
