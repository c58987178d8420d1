"""FoldGPT: blocks that matter least are removed, and neighbours among the others share one set of matrices.

How much a block matters is learned: a gate on what each block adds is trained with all gates together, so that a block
that another makes up for counts little. Sharing saves memory and no time. No code was published; `fold+recover` trains
the shared matrices afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Data, System, Technique
from effbench.toolbox.checks import within
from effbench.toolbox.slicing import fixed_places
from effbench.toolbox.structure import keep_blocks
from effbench.toolbox.training import Recipe, check_training, next_token_loss, train
from effbench.toolbox.walk import blocks, matrices, matrix_names


@dataclass(frozen=True)
class Fold(Technique):
    """Remove the blocks whose gates end lowest and let runs of neighbours compute with the first one's matrices.

    sparsity: share of the blocks that are removed, rounded to whole ones.
    group_size: blocks that share matrices; norms stay each block's own. 1 shares nothing.
    penalty: weight, beside the loss, of the mean gate, which drives gates to zero.
    steps: of training the gates alone, with AdamW; none where no block is removed.
    batch_size, length: sequences in a step, and tokens in each.
    lr: the highest learning rate of the gates.
    seed: of the order in which text is read.
    """

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2407.00928"

    sparsity: float = 0.25
    group_size: int = 2
    penalty: float = 0.5
    steps: int = 60
    batch_size: int = 4
    length: int = 256
    lr: float = 2e-2
    seed: int = 0

    def __post_init__(self) -> None:
        within("sparsity", self.sparsity, 0, 1)
        within("group_size", self.group_size, 1)
        within("penalty", self.penalty, 0)
        check_training(self.steps, self.batch_size, self.length, self.lr)

    def unfit(self, system: System) -> str | None:
        layers = blocks(system.model)[1]
        removed = self._removed(len(layers))
        if removed == len(layers) or (self.sparsity and not removed):
            return (
                f"sparsity={self.sparsity:g} of its {len(layers)} blocks is {'all of them' if removed else 'not one'}"
            )
        if not matrices(system.model):
            return "no plain weight matrix is left to share: put this technique before the one that packs them"
        if self.group_size > 1 and any(_shapes(block) != _shapes(layers[0]) for block in layers):
            return "its blocks are of unlike shapes, so that their matrices cannot be shared"
        return fixed_places(layers) if removed else None

    def _removed(self, depth: int) -> int:
        return int(self.sparsity * depth + 0.5)

    def apply(self, system: System, data: Data) -> System:
        model, layers = system.model, blocks(system.model)[1]
        removed = self._removed(len(layers))
        if removed:
            batches = data.batches(self.steps, self.batch_size, self.length, seed=self.seed)
            gates = trained_gates(model, batches, self.penalty, Recipe(self.steps, self.lr))
            left_out = set(gates.argsort(stable=True)[:removed].tolist())
            keep_blocks(model, [place for place in range(len(layers)) if place not in left_out])
        left = list(blocks(model)[1])
        for start in range(0, len(left), self.group_size):
            share(left[start], left[start + 1 : start + self.group_size])
        return system


def trained_gates(model: Any, batches: Iterator[Tensor], penalty: float, recipe: Recipe) -> Tensor:
    """Factors, (blocks,), of what each block adds, after training them alone; all are 1 at first."""
    layers = blocks(model)[1]
    gates = [nn.Parameter(torch.ones((), device=model.device)) for _ in layers]

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return next_token_loss(logits, ids) + penalty * torch.stack(gates).abs().mean()

    with _gated(layers, gates):
        train(model, batches, loss, recipe, parameters=gates)
    return torch.stack([gate.detach().cpu() for gate in gates])


@contextmanager
def _gated(layers: nn.ModuleList, gates: list[nn.Parameter]) -> Iterator[None]:
    """While open, each block adds what it would to its input, times its gate."""

    def gating(gate: nn.Parameter) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            fed = args[0] if args else keywords["hidden_states"]
            given, *rest = output if isinstance(output, tuple) else (output,)
            given = fed + gate * (given - fed)
            return (given, *rest) if isinstance(output, tuple) else given

        return hook

    pairs = zip(layers, gates, strict=True)
    handles = [layer.register_forward_hook(gating(gate), with_kwargs=True) for layer, gate in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share(first: nn.Module, others: list[nn.Module]) -> None:
    """Let `others` compute with the very matrices, and their biases, of the block `first`."""
    for name in matrix_names(first):
        source: Any = first.get_submodule(name)
        for other in others:
            target: Any = other.get_submodule(name)
            target.weight, target.bias = source.weight, source.bias


def _shapes(block: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in block.named_parameters()]
