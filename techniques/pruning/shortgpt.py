"""ShortGPT: the blocks that change the residual stream least are left out.

What is left is an ordinary model of fewer blocks, with a smaller cache.
"""

from dataclasses import dataclass
from math import acos, pi
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from effbench.technique import Data, System, Technique
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.slicing import fixed_places
from effbench.toolbox.structure import keep_blocks
from effbench.toolbox.walk import blocks, walk


@dataclass(frozen=True)
class ShortGPT(Technique):
    """Remove the blocks of least influence, all at once.

    sparsity: share of the blocks that are removed, rounded to whole ones.
    criterion: "influence" is 1 minus the cosine between what a block is fed and what it gives, averaged over tokens;
        "angular" removes the run of blocks over which the last token's state turns least (Gromov et al. 2024,
        arXiv:2403.17887).
    samples: sequences of calibration text, each as long as the model's context.
    """

    paper: ClassVar[str] = "Men et al. 2024, arXiv:2403.03853"

    sparsity: float = 0.25
    criterion: str = "influence"
    samples: int = 128

    def __post_init__(self) -> None:
        within("sparsity", self.sparsity, 0, 1)
        one_of("criterion", self.criterion, ("influence", "angular"))
        within("samples", self.samples, 1)

    def unfit(self, system: System) -> str | None:
        layers = blocks(system.model)[1]
        depth = len(layers)
        removed = self._removed(depth)
        if removed == depth or (self.sparsity and not removed):
            return f"sparsity={self.sparsity:g} of its {depth} blocks is {'all of them' if removed else 'not one'}"
        return fixed_places(layers) if removed else None

    def _removed(self, depth: int) -> int:
        return int(self.sparsity * depth + 0.5)

    def apply(self, system: System, data: Data) -> System:
        depth = len(blocks(system.model)[1])
        removed = self._removed(depth)
        if not removed:
            return system
        ids = data.calibration(self.samples, min(system.context, 2048))
        if self.criterion == "influence":
            influence = torch.tensor(block_influence(system.model, ids))
            left_out = set(influence.argsort(stable=True)[:removed].tolist())
        else:
            first = _flattest_run(system.model, ids, removed)
            left_out = set(range(first, first + removed))
        keep_blocks(system.model, [place for place in range(depth) if place not in left_out])
        return system


@torch.no_grad()
def block_influence(model: torch.nn.Module, ids: Tensor) -> list[float]:
    """1 - cosine between the residual stream before and after each block, averaged over the tokens of `ids`."""
    found = []
    for block in walk(model, ids):
        before = list(block.hidden)
        block.advance()
        pairs = zip(before, block.hidden, strict=True)
        cosines = [cosine_similarity(one.float(), other.float(), dim=-1).double().flatten() for one, other in pairs]
        found.append(1 - float(torch.cat(cosines).mean()))
    return found


@torch.no_grad()
def _flattest_run(model: torch.nn.Module, ids: Tensor, length: int) -> int:
    """Where the run of so many blocks starts over which the last token's state turns by the least mean angle."""
    states = []
    for block in walk(model, ids):
        states.append(torch.cat([hidden[:, -1].float() for hidden in block.hidden]))
        block.advance()
        last = torch.cat([hidden[:, -1].float() for hidden in block.hidden])
    states.append(last)
    angles = []
    for first in range(len(states) - length):
        cosines = cosine_similarity(states[first], states[first + length], dim=-1).clamp(-1, 1)
        angles.append(sum(acos(cosine) for cosine in cosines.tolist()) / pi)
    return min(range(len(angles)), key=angles.__getitem__)
