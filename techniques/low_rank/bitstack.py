"""BitStack: each matrix a stack of sign and low-rank blocks, of which as many are loaded as the memory takes.

Every block is made from what those before it have left. Which matrix gets the next block is found by trying: the one
whose block lessens the model's loss on calibration text most.
"""

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.bitstack import BitStackLinear, block_bytes
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.training import next_token_loss
from effbench.toolbox.walk import compress_blocks, matrices, replace_module

TRIED = 32
"""Calibration sequences on which blocks are tried."""


@dataclass(frozen=True)
class BitStack(LayerTechnique):
    """Store each matrix as so many blocks of signs and two thin factors as fit a budget of bytes.

    megabytes: of 10^6 bytes, for all that the system stores; 0 for what it stores now.
    rank: of a block's factors.
    blocks: of a matrix at most.
    samples: sequences of calibration text, each as long as the model's context, at most 2048 tokens.
    factor_dtype: "float16", or "float32" for comparing with published code.
    """

    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2410.23918"
    dense_inputs: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("square_sum",)

    megabytes: float = 0.0
    rank: int = 16
    blocks: int = 16
    samples: int = 256
    factor_dtype: str = "float16"

    def __post_init__(self) -> None:
        within("megabytes", self.megabytes, 0, 1e9)
        within("rank", self.rank, 1)
        within("blocks", self.blocks, 1)
        within("samples", self.samples, 1)
        one_of("factor_dtype", self.factor_dtype, ("float16", "float32"))

    def unfit(self, system: System) -> str | None:
        reason = super().unfit(system)
        if reason is None:
            try:
                self._budget(system)
            except UnfitError as unfit:
                return str(unfit)
        return reason

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        """All `blocks` blocks; a budget is the whole model's."""
        return self._stack(linear, inputs, self.blocks)

    def _stack(self, linear: nn.Linear, inputs: Inputs | Tensor | None, blocks: int) -> BitStackLinear:
        seen = Inputs.of(inputs)
        # the least that an input counts for is what the released code adds to its norm over 2048 tokens
        scales = (seen.square_sum / seen.tokens).sqrt() + 1e-3 / 2048**0.5
        return BitStackLinear.stack(linear, self.rank, blocks, scales, self.factor_dtype)

    def apply(self, system: System, data: Data) -> System:
        every, spare, costs = self._budget(system)
        dense = {name: linear.weight.nbytes for name, linear in matrices(system.model)}
        most = every + (every < self.blocks and spare >= min(costs.values()))
        ids = data.calibration(**self.calibration_size(system))
        compress_blocks(
            system.model,
            lambda linear, inputs: self._stack(linear, inputs, most),
            ids,
            dense_inputs=True,
            statistics=self.statistics,
        )
        stacks: dict[str, Any] = {name: system.model.get_submodule(name) for name in costs}
        stacks = {name: stack for name, stack in stacks.items() if isinstance(stack, BitStackLinear)}
        for name in costs.keys() - stacks.keys():  # an expert that the text never reaches stays as it is
            spare += every * costs[name] - dense[name]
        while spare < 0 and every > 1:
            every, spare = every - 1, spare + sum(costs[name] for name in stacks)
        if spare < 0:
            raise UnfitError(
                "experts that the calibration text never reaches stay as they are and leave less than one block of "
                "each other matrix; raise samples or megabytes"
            )
        if most > every + 1:
            stacks = {name: stack.first(every + 1) for name, stack in stacks.items()}
        for name, stack in stacks.items():
            replace_module(system.model, name, stack.first(every))
        if most > every:
            losses = {name: _loss_with(system.model, name, stack, ids[:TRIED]) for name, stack in stacks.items()}
            for name in sorted(losses, key=lambda name: losses[name]):
                spare -= costs[name]
                if spare < 0:
                    break
                replace_module(system.model, name, stacks[name])
        return system

    def _budget(self, system: System) -> tuple[int, int, dict[str, int]]:
        """How many blocks every matrix can have, what bytes are left then, and what a block of each takes.

        Raises `UnfitError` where not even one block of each fits.
        """
        found, now = matrices(system.model), _stored_bytes(system)
        costs = {name: block_bytes(linear.weight.shape, self.rank, self.factor_dtype) for name, linear in found}
        budget = int(self.megabytes * 1e6) or now
        freed = {linear.weight.data_ptr(): linear.weight.nbytes for _, linear in found}  # blocks may share a matrix
        spare, each = budget - now + sum(freed.values()), sum(costs.values())
        if spare < each:
            least = (budget - spare + each) / 1e6
            raise UnfitError(
                f"one block of each matrix, and all that is left as it is, take {least:.3f} MB, more than the "
                f"{budget / 1e6:.3f} MB there are; raise megabytes or lower rank"
            )
        every = min(self.blocks, spare // each)
        return every, spare - every * each, costs


@torch.no_grad()
def _loss_with(model: Any, name: str, stack: BitStackLinear, ids: Tensor) -> float:
    """The loss on `ids` with `stack` in the place called `name`; infinite where it is no number."""
    before = model.get_submodule(name)
    replace_module(model, name, stack)
    rows = ids.to(model.device)[:, None]
    losses = [float(next_token_loss(model(input_ids=row, use_cache=False).logits, row)) for row in rows]
    replace_module(model, name, before)
    loss = sum(losses)
    return loss if loss == loss else inf


def _stored_bytes(system: System) -> int:
    models = (system.model, *system.parts.values())
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
