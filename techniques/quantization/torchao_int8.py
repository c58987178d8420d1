"""TorchAO's int8 weights: symmetric, one scale a row. By torchao, which is optional."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique, System
from effbench.toolbox.extras import lacks, require
from effbench.toolbox.packed import PackedLinear


@dataclass(frozen=True)
class TorchAOInt8(LayerTechnique):
    """Store weights as the library's int8 codes with a float32 scale a row; inputs are not rounded.

    The library's own tensors unpack themselves for every product; here its codes go through the int8 kernel.
    """

    paper: ClassVar[str] = "the library torchao"
    needs_inputs: ClassVar[bool] = False
    bits: ClassVar[int] = 8

    def unfit(self, system: System) -> str | None:
        return lacks("torchao", "torchao") or super().unfit(system)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return None if torch.isfinite(linear.weight).all() else "it has weights that are not finite"

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        require("torchao", "torchao")
        from torchao.quantization import PerRow
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

        theirs = Int8Tensor.from_hp(linear.weight.detach().contiguous(), granularity=PerRow())
        codes = theirs.qdata.view(torch.uint8) ^ 128
        return PackedLinear.pack(codes, theirs.scale.view(-1, 1), None, 8, linear.bias, scale_dtype="float32")
