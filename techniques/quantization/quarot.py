"""QuaRot: turn what flows through the model by random Hadamard transforms, so that nothing stands out, then round it.

A turned vector has no outlier channels, neither have the weights that read it, and the model's outputs do not change.
So plain grids fit, for inputs too. Transforms that no weight can take in are done for every token as it passes.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from effbench.technique import Data, Inputs, System, Technique
from effbench.toolbox.architectures import READ_DIRECTLY
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.compensation import Compensation
from effbench.toolbox.packed import PackedLinear, misfit
from effbench.toolbox.packing import Packing
from effbench.toolbox.rotation import TurnedLinear, rotate
from effbench.toolbox.walk import blocks, compress_blocks, matrices, replace_module


@dataclass(frozen=True)
class QuaRot(Technique):
    """Turn the model, then store each weight as one of 2^bits levels about zero; inputs are rounded as asked.

    bits: of a code: 8, 4, 3 or 2; 16 to turn only, which changes no output but for rounding.
    method: how weights are rounded: "gptq", or "rtn": to the nearest level of the range with the least weight error.
    group_size: how many inputs of a row share a grid; 0 for the whole row.
    activation_bits: of each number that goes into a matrix, one range a token; 16 leaves them. They are rounded and
        then multiplied in the model's dtype, so that this costs time and saves none.
    clip: the share of its largest number that a token's range reaches to.
    damping: share of the Hessian's mean diagonal that is added to it, for gptq.
    samples: sequences of calibration text for gptq, each as long as the model's context, at most 2048 tokens.
    seed: of the signs that make the transforms random.
    """

    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv:2404.00456"

    bits: int = 4
    method: str = "gptq"
    group_size: int = 0
    activation_bits: int = 16
    clip: float = 1.0
    damping: float = 0.01
    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (16, 8, 4, 3, 2))
        one_of("method", self.method, ("gptq", "rtn"))
        within("group_size", self.group_size, 0)
        within("activation_bits", self.activation_bits, 2, 16)
        within("clip", self.clip, 0.1, 1)
        within("damping", self.damping, 0)
        within("samples", self.samples, 1)

    def unfit(self, system: System) -> str | None:
        found = matrices(system.model)
        if not found:
            return "no plain weight matrix is left to turn: put this technique before the one that packs them"
        for name, linear in found:
            if reason := misfit(linear, self.group_size):
                return f"{name}: {reason}"
            if not bool(linear.weight.isfinite().all()):
                return f"{name}: it has weights that are not finite"
        return None

    def apply(self, system: System, data: Data) -> System:
        rotate(system.model, self.seed)
        if self.bits < 16:
            ids = None
            if self.method == "gptq":
                ids = data.calibration(self.samples, min(system.context, 2048))
            compress_blocks(system.model, self.packed, ids, statistics=("gram",))
        if self.activation_bits < 16:
            self._round_inputs(system.model)
        return system

    def packed(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> PackedLinear:
        """`linear` (out, in), turned already, as packed codes; `inputs` (tokens, in) are what goes into it."""
        packing = Packing.of(linear, self.bits, self.group_size, symmetric=True)
        if self.method == "rtn":
            return packing.rounded(packing.groups(linear.weight), linear.bias, mse=True)
        way = Compensation(self.bits, self.group_size, symmetric=True, damping=self.damping, dtype=packing.dtype)
        codes, scales, zeros, _ = way.quantize(linear.weight, Inputs.of(inputs).gram)
        return packing.pack(codes, scales, zeros, linear.bias, linear.weight.detach())

    def _round_inputs(self, model: nn.Module) -> None:
        """Have every matrix in the blocks round what goes into it."""
        _, layers = blocks(model)
        kinds = (PackedLinear, nn.Linear)
        for name, module in list(layers.named_modules()):
            if isinstance(module, TurnedLinear):
                new = TurnedLinear.around(module.inner, activation_bits=self.activation_bits, clip=self.clip)
            elif isinstance(module, kinds) and name.rpartition(".")[2] not in ("inner", *READ_DIRECTLY):
                new = TurnedLinear.around(module, turned=False, activation_bits=self.activation_bits, clip=self.clip)
            else:
                continue
            replace_module(layers, name, new)
