"""Outlier channels on demand: an artificial stressor, not a property of the trained models.

Large language models have a few channels with activations tens of times larger than the others (Dettmers et al. 2022,
"LLM.int8()", section 4; Xiao et al. 2023, "SmoothQuant", section 3), which is what activation-aware methods are made
for. Models as small as the reference family have none. `inject` makes them without changing what the model computes:
a channel of a norm's weight is scaled up and the columns that read it are scaled down by the same power of two, which
is exact in binary floating point.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def inject(model: nn.Module, channels: float = 0.06, scale: float = 32.0, seed: int = 0) -> None:
    """Scale a share of the channels behind every norm of a Llama-like model, in place; its outputs do not change.

    `channels` is the share of the channels (at least one a norm), drawn by `seed`; `scale` a power of two.
    """
    if scale <= 0 or torch.tensor(scale).log2() % 1 != 0:
        raise ValueError(f"the scale must be a power of two for the outputs to stay the same; got {scale}")
    generator = torch.Generator().manual_seed(seed)
    for block in model.get_submodule("model.layers").children():
        attention, feedforward = block.get_submodule("self_attn"), block.get_submodule("mlp")
        readers = {
            "input_layernorm": [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")],
            "post_attention_layernorm": [feedforward.get_submodule(name) for name in ("gate_proj", "up_proj")],
        }
        for norm, linears in readers.items():
            weight = block.get_parameter(f"{norm}.weight")
            chosen = torch.randperm(len(weight), generator=generator)[: max(1, round(channels * len(weight)))]
            weight[chosen] *= scale
            for linear in linears:
                linear.get_parameter("weight")[:, chosen] /= scale
