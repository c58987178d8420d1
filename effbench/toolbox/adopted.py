"""Checkpoints that another library quantized: our own layers over its very codes, which can be counted and saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effbench.toolbox.bitsandbytes import FourBitLinear, library, tileable
from effbench.toolbox.llm_int8 import LLMInt8Linear
from effbench.toolbox.walk import replace_module


def adopt(model: Any) -> bool:
    """Put our layers in the place of those of bitsandbytes; returns whether the model is then made of what we know.

    The codes and scales stay those of the checkpoint. Layers of other libraries stay what they are.
    """
    method = getattr(model.config.quantization_config, "quant_method", "")
    if getattr(method, "value", method) != "bitsandbytes":
        return False
    library()
    import bitsandbytes.nn

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            replace_module(model, name, _four_bits(module, model.dtype))
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            replace_module(model, name, _eight_bits(module))
    model.hf_quantizer, model.is_quantized = None, False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    return True


def _four_bits(module: Any, dtype: torch.dtype) -> nn.Module:
    state, codes = module.weight.quant_state, module.weight.data
    tiled = tileable(state.shape, state.blocksize, dtype, codes.device)
    return FourBitLinear.of(codes, state, module.bias, tiled)


def _eight_bits(module: Any) -> nn.Module:
    bias, weight = module.bias, module.weight
    dtype = str(bias.dtype if bias is not None else torch.float32).removeprefix("torch.")
    threshold = float(module.state.threshold)
    new = LLMInt8Linear(module.in_features, module.out_features, threshold, bias is not None, dtype)
    new.codes, new.scales = weight.data, weight.SCB.float()
    if bias is not None:
        new.bias = bias.detach().clone()
    return new
