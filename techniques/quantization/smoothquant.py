"""SmoothQuant: 8-bit weights and 8-bit inputs, with large inputs made smaller at the cost of the weights they meet.

The scales are folded into the norms before; inputs that come from no norm (those of attention's and the feedforward's
last matrix) are rounded as they are. The products are those of whole numbers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.folding import find_folds, fold
from effbench.toolbox.int8 import Int8Linear
from effbench.toolbox.prepared import ScaledLinear
from effbench.toolbox.walk import Block, as_linear, walk

SMALLEST = 1e-5
"""What a scale, or the largest weight of an input, counts as if it is below that."""


@dataclass(frozen=True)
class SmoothQuant(LayerTechnique):
    """Round weights to int8 for each output and inputs to int8 for each token, after moving outliers into weights.

    alpha: how much of the inputs' range is moved into the weights: 0.5 makes both alike, 1 moves all of it. The paper
        has 0.5 for OPT and BLOOM; for Llamas the released code has 0.8 to 0.9, and 0.75 is best on ours.
    samples: sequences of calibration text, each as long as the model's context, at most 512 tokens.
    scale_dtype: "float16", or "float32" for comparing with published code.
    """

    paper: ClassVar[str] = "Xiao et al. 2023, arXiv:2211.10438"
    dense_inputs: ClassVar[bool] = True
    bits: ClassVar[int] = 8
    statistics: ClassVar[tuple[str, ...]] = ("max_abs",)

    alpha: float = 0.75
    samples: int = 512
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        within("alpha", self.alpha, 0, 1)
        within("samples", self.samples, 1)
        one_of("scale_dtype", self.scale_dtype, ("float16", "float32"))

    def calibration_size(self, system: System) -> dict[str, int]:
        return {"samples": self.samples, "length": min(system.context, 512)}

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        """One matrix by itself: its scales divide the inputs at run time, since there is nothing to fold them into."""
        scales = self._scales(Inputs.of(inputs), [linear]).to(getattr(torch, self.scale_dtype))
        scaled = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        scaled.weight = nn.Parameter(linear.weight.detach().float() * scales.float(), requires_grad=False)
        scaled.bias = linear.bias
        return ScaledLinear.of(Int8Linear.pack(scaled, self.scale_dtype), scales)

    @torch.no_grad()
    def apply(self, system: System, data: Data) -> System:
        heads = int(getattr(system.config, "num_attention_heads", 1))
        blocks = walk(system.model, data.calibration(**self.calibration_size(system)))
        if not any([self._compress(block, heads) for block in blocks]):
            raise UnfitError("no norm gives the inputs of matrices and of nothing else, so none can take their scales")
        return system

    def _compress(self, block: Block, heads: int) -> int:
        """Smooth and round a block; how many of its norms took scales."""
        places = [place for place in find_folds(block, heads) if place.rows is None]
        inputs = block.inputs(block.matrices(), self.statistics, advance=True)
        scales = []
        for place in places:
            readers = [as_linear(block.module.get_submodule(name)) for name in place.readers]
            scales.append((place, self._scales(inputs[place.readers[0]], readers)))
        scaling = fold(block, scales)
        for name, seen in inputs.items():
            scaled = scaling.linear(block, name)
            block.replace(name, lambda *_, scaled=scaled: Int8Linear.pack(scaled, self.scale_dtype), seen)
        return len(places)

    def _scales(self, inputs: Inputs, readers: list[nn.Linear]) -> Tensor:
        """What to divide the inputs (in,) by that all `readers` share."""
        largest = torch.stack([linear.weight.detach().float().abs().amax(0) for linear in readers]).amax(0)
        seen = inputs.max_abs
        scales = (seen.pow(self.alpha) / largest.clamp(min=SMALLEST).pow(1 - self.alpha)).clamp(min=SMALLEST)
        return scales.masked_fill(seen == 0, 1.0)  # an input that is never used says nothing of its range
