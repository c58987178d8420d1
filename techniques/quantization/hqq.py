"""Half-quadratic quantization: no data, but zero points that make up for what rounding did to each group.

The p-norm of the weight error with p < 1 is lessened in turns: an error that may be large in few places is taken out,
then each group's zero point becomes the mean of what the rest asks for. Scales stay, zero points are no whole numbers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.packed import misfit
from effbench.toolbox.packing import Packing

PENALTY, GROWTH = 10.0, 1.01
"""How dear it is that error and taken-out error differ, at first, and by what factor it grows with each turn."""
FINEST = 2.0**-10
"""The least step, as a share of a group's largest weight: no zero point leaves float16."""


@dataclass(frozen=True)
class HalfQuadratic(LayerTechnique):
    """Round to grids whose zero points are fitted to the weights by half-quadratic splitting, and pack the codes.

    bits: of a code: 8, 4, 3 or 2.
    group_size: how many inputs of a row share a grid; 0 for the whole row.
    norm: p of the p-norm of the weight error that is lessened, at most 1.
    steps: turns at most; a matrix stops at the first that does not lessen its mean absolute error. 0 is plain
        rounding to the grids that it starts with.
    scale_dtype: of scales and zero points: "float16", or "float32" for comparing with published code. Where the int4
        kernel computes, they are the bfloat16 pairs that it reads.
    """

    paper: ClassVar[str] = "Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models"
    needs_inputs: ClassVar[bool] = False

    bits: int = 4
    group_size: int = 64
    norm: float = 0.7
    steps: int = 20
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (8, 4, 3, 2))
        within("group_size", self.group_size, 0)
        within("norm", self.norm, 0.1, 1)
        within("steps", self.steps, 0)
        one_of("scale_dtype", self.scale_dtype, ("float16", "float32"))

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.group_size)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        packing = Packing.of(linear, self.bits, self.group_size, scale_dtype=self.scale_dtype)
        groups = packing.groups(linear.weight.float())
        scales, zeros = self._grids(groups, packing.dtype)
        codes = self._codes(groups, scales, zeros).to(torch.uint8).flatten(1)
        scales, zeros, weight = scales.squeeze(-1), zeros.squeeze(-1), linear.weight.detach()
        return packing.pack(codes, scales, zeros, linear.bias, weight, zeros_dtype=self.scale_dtype)

    def _grids(self, groups: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and zero points (out, groups, 1) for `groups` (out, groups, width), rounded as they are stored."""
        low, high = groups.aminmax(dim=-1, keepdim=True)
        largest = torch.maximum(-low, high)
        scales = (high - low) / (2**self.bits - 1)
        # a group of equal weights has no range of its own; the step reaches from zero to them
        scales = torch.where(scales > 0, scales, largest)
        scales = scales.clamp(min=FINEST * largest).clamp(min=torch.finfo(torch.float16).smallest_normal)
        scales = scales.to(stored).float()
        zeros = -low / scales
        if self.bits == 4:  # as the released code has it
            zeros = zeros.round()
        zeros = self._fitted(groups, scales, zeros)
        # with tiles, it is scale times zero point that is stored in bfloat16, which errs less than the zero point would
        return scales, zeros if stored == torch.bfloat16 else zeros.to(stored).float()

    def _fitted(self, groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The zero points after the last turn. The turn after the best one counts, as in the released code."""
        penalty, least = PENALTY, torch.inf
        for _ in range(self.steps):
            codes = self._codes(groups, scales, zeros)
            errors = groups - (codes - zeros) * scales
            sizes = errors.abs()
            taken_out = errors.sign() * (sizes - sizes.pow(self.norm - 1) / penalty).relu()
            zeros = (codes - (groups - taken_out) / scales).mean(-1, keepdim=True)
            penalty *= GROWTH
            error = float(sizes.mean())
            if error >= least:
                break
            least = error
        return zeros

    def _codes(self, groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return (groups / scales + zeros).round().clamp(0, 2**self.bits - 1)
