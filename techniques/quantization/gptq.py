"""GPTQ: round a matrix column after column, and let later columns make up for the error of each on calibration inputs.

Groups whose columns are quantized out of their own order share no grid with their neighbours. Their codes are stored
in the order of quantizing, groups in one piece, and the inputs are put in that order at run time: this takes the same
32 bits an input as an index of groups would, and every kernel for groups can compute with it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Inputs, LayerTechnique
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.compensation import Compensation
from effbench.toolbox.packed import misfit
from effbench.toolbox.packing import Packing
from effbench.toolbox.prepared import ReorderedLinear


@dataclass(frozen=True)
class GPTQ(LayerTechnique):
    """Store each weight as one of 2^bits evenly spaced levels, chosen column by column so that outputs change least.

    bits: of a code: 8, 4, 3 or 2.
    group_size: how many inputs of a row share a grid; 0 for the whole row.
    symmetric: grids reach as far below zero as above and store no zero point.
    act_order: quantize the inputs with the largest activations first.
    static_groups: fit the groups' grids before any column is changed; with act_order this spares the stored order.
    damping: share of the Hessian's mean diagonal that is added to it; very much of it gives plain rounding.
    block_size: columns whose errors are passed on to later ones at once.
    true_sequential: matrices of a block are also fed by the quantized ones before them in that block.
    samples: sequences of calibration text, each as long as the model's context, at most 2048 tokens.
    scale_dtype: "float16", or "float32" for comparing with published code. Where the int4 kernel computes, scales
        and zero points are the bfloat16 pairs that it reads.
    """

    paper: ClassVar[str] = "Frantar et al. 2023, arXiv:2210.17323"
    statistics: ClassVar[tuple[str, ...]] = ("gram",)

    bits: int = 4
    group_size: int = 0
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    block_size: int = 128
    true_sequential: bool = False
    samples: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (8, 4, 3, 2))
        within("group_size", self.group_size, 0)
        within("damping", self.damping, 0)
        within("block_size", self.block_size, 1)
        within("samples", self.samples, 1)
        one_of("scale_dtype", self.scale_dtype, ("float16", "float32"))

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.group_size)

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        weight = linear.weight.detach()
        packing = Packing.of(linear, self.bits, self.group_size, self.symmetric, self.scale_dtype)
        way = Compensation(
            self.bits,
            self.group_size,
            self.symmetric,
            self.act_order,
            self.static_groups,
            self.damping,
            self.block_size,
            packing.dtype,
        )
        codes, scales, zeros, order = way.quantize(weight, Inputs.of(inputs).gram)
        weight = weight if order is None else weight[:, order]
        packed = packing.pack(codes, scales, zeros, linear.bias, weight)
        return packed if order is None else ReorderedLinear.of(packed, order)
