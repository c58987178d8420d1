"""TorchAO's int4 weights for CPUs: groups with a scale and a zero point, in the int4 kernel's layout. By torchao."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from effbench.technique import Inputs, LayerTechnique, System
from effbench.toolbox.checks import one_of
from effbench.toolbox.extras import lacks, require
from effbench.toolbox.kernels.tiles import machine_tile, unpack_tiles
from effbench.toolbox.packed import PackedLinear, misfit


@dataclass(frozen=True)
class TorchAOInt4(LayerTechnique):
    """Store weights as the library's 4-bit codes, each group with a bfloat16 scale and zero point.

    group_size: how many inputs of a row share a grid: 128, 64 or 32.

    Its other int4 formats have no kernel for a CPU; this one is a prototype. Rows that do not fill the kernel's tiles
    keep codes and grids, zero points in float16, and no kernel computes.
    """

    paper: ClassVar[str] = "the library torchao"
    needs_inputs: ClassVar[bool] = False
    bits: ClassVar[int] = 4

    group_size: int = 64

    def __post_init__(self) -> None:
        one_of("group_size", self.group_size, (128, 64, 32))

    def unfit(self, system: System) -> str | None:
        absent = None if machine_tile() else "ATen's int4 kernel, for which it packs, is not on this machine"
        return lacks("torchao", "torchao") or absent or super().unfit(system)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        if reason := misfit(linear, self.group_size):
            return reason
        if linear.weight.device.type != "cpu":
            return "the library packs for this kernel on a CPU only"
        return None if torch.isfinite(linear.weight).all() else "it has weights that are not finite"

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        require("torchao", "torchao")
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor

        weight, tile = linear.weight.detach().bfloat16(), machine_tile()
        rows, missing = linear.out_features, -linear.out_features % tile
        filled = functional.pad(weight, (0, 0, 0, missing)).contiguous()
        theirs = Int4OpaqueTensor.from_hp(filled, [1, self.group_size])
        codes = unpack_tiles(theirs.qdata.flatten(), tile, rows + missing)[:rows]
        scales, shifts = theirs.scale_and_zero[:, :rows].float().transpose(0, 1).unbind(-1)
        zeros, tile = 8 - shifts / scales, 0 if missing else tile
        return PackedLinear.pack(codes, scales, zeros, 4, linear.bias, zeros_dtype="float16", tile=tile)
