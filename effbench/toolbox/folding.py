"""Moving a scale for each input of a matrix into the operation before it, which then gives those inputs scaled.

Which operation that is, is found by trial and not by name: a scale of 2 or 1/2 for each input, drawn at random, is
taken out of a candidate and put into the matrices that may read it. Powers of two are exact in binary floating point,
so the block gives the very same numbers if nothing else reads the candidate and nothing in between bends them, as
GELU does and ReLU does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from effbench.toolbox.architectures import is_norm
from effbench.toolbox.experts import expert_of
from effbench.toolbox.walk import Block, as_linear, captured_inputs

TOLERATED = 1e-3
"""Share of a block's outputs that may differ after a trial, where a sum was taken in another order."""
NEARLY = 0.02
"""How far outputs may move where they need only be nearly the same, as a share of what a block adds to its input."""


@dataclass(frozen=True)
class Fold:
    """A place for scales: `source` gives the inputs of all `readers`, which are matrices, and of nothing else.

    rows: if the source is a matrix, the row (in,) that each input comes from; attention heads that share keys and
        values share rows. `None` if it is a norm.
    offset: a norm that multiplies by its weight + 1 has 1.
    """

    source: str
    readers: tuple[str, ...]
    rows: Tensor | None = None
    offset: float = 0.0

    def mean(self, values: Tensor) -> Tensor:
        """`values` (in,) averaged over the inputs that come from one row: these can only be scaled alike."""
        if self.rows is None:
            return values
        used, places = self.rows.to(values.device).unique(return_inverse=True)
        sums = values.new_zeros(len(used)).index_add_(0, places, values)
        return (sums / torch.bincount(places).to(values.dtype))[places]


@dataclass
class Scaling:
    """What a block's matrices have to be multiplied with, (out,) and (in,), once scales were folded into it."""

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]

    def linear(self, block: Block, name: str) -> nn.Linear:
        """The scaled matrix, its weight in float32, in which scaling loses nothing that a grid would see."""
        plain = as_linear(block.module.get_submodule(name))
        scaled = nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta")
        weight = plain.weight.detach().float()
        if name in self.columns:
            weight = weight * self.columns[name]
        bias = None if plain.bias is None else plain.bias.detach()
        if name in self.rows:
            weight = weight * self.rows[name][:, None]
            bias = None if bias is None else (bias.float() * self.rows[name]).to(bias.dtype)
        scaled.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            scaled.bias = nn.Parameter(bias, requires_grad=False)
        return scaled


def fold(block: Block, scales: list[tuple[Fold, Tensor]]) -> Scaling:
    """Divide what the sources give by scales (in,): norms in place, matrices and readers by the result.

    A norm's weight is rounded to its dtype, and its readers make up for what was really taken out of it.
    """
    scaling = Scaling({}, {})
    for place, factors in scales:
        if place.rows is None:
            factors = _divide_norm(block.module.get_submodule(place.source), factors, place.offset)
        else:
            source = as_linear(block.module.get_submodule(place.source))
            taken = factors.new_ones(source.out_features)
            taken[place.rows] = 1 / factors
            scaling.rows[place.source] = taken
        scaling.columns.update(dict.fromkeys(place.readers, factors))
    return scaling


def _divide_norm(norm: Any, factors: Tensor, offset: float) -> Tensor:
    """Divide what a norm gives by `factors` (width,) in place, and return those by which it was divided."""
    before = norm.weight.data.float() + offset
    norm.weight.data = (before / factors - offset).to(norm.weight.dtype)
    after = norm.weight.data.float() + offset
    done = torch.where((before == 0) | (after == 0), factors, before / after)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = (norm.bias.data.float() / done).to(norm.bias.dtype)
    return done


def find_folds(block: Block, heads: int = 1) -> list[Fold]:
    """All places for scales in a block, tried on its first call; `heads` is the number of attention heads."""
    names = block.matrices()
    norms = [name for name, module in block.module.named_modules() if is_norm(module)]
    with captured_inputs(block.module, names) as seen, _outputs(block.module, norms) as given:
        expected = block.run(0)
    sources = {_key(tensor): name for name, tensor in given.items()}
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, tensors in seen.items():
        together.setdefault(_key(tensors[0]), []).append(name)
    found, order = [], list(seen)
    for key, readers in together.items():
        if key in sources:
            candidates = [Fold(sources[key], tuple(readers), offset=offset) for offset in (0.0, 1.0)]
        else:
            width = as_linear(block.module.get_submodule(readers[0])).in_features
            before = [name for name in order[: order.index(readers[0])] if name not in readers]
            expert = expert_of(block.module, readers[0])
            if expert is not None:  # which reads what was chosen for it, and then its own first matrix
                before = [name for name in before if expert_of(block.module, name) == expert]
            candidates = [
                Fold(source, tuple(readers), rows=rows)
                for source in reversed(before)
                for rows in _row_layouts(as_linear(block.module.get_submodule(source)).out_features, width, heads)
            ]
        found += [place for place in candidates if _holds(block, place, expected)][:1]
    return found


def find_products(block: Block) -> set[str]:
    """The matrices whose outputs only matter multiplied with another's that is fed alike, as queries do with keys.

    One is made 8 times larger and the other 8 times smaller. Norms of queries and keys have a small constant in
    their roots, so that the outcome is not quite the same.
    """
    expected = block.run(0)
    found: set[str] = set()
    for readers in block.groups(block.matrices()):
        for one, other in combinations(readers, 2):
            with _kept(block, [one, other]):
                _scale(as_linear(block.module.get_submodule(one)), 8.0)
                _scale(as_linear(block.module.get_submodule(other)), 0.125)
                if _nearly_same(block, block.run(0), expected):
                    found |= {one, other}
    return found


def _key(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor from others that are alive: where it lies, and its width."""
    return tensor.data_ptr(), tensor.shape[-1]


def _row_layouts(out_features: int, width: int, heads: int) -> Iterator[Tensor]:
    """The rows (width,) of a matrix from which the inputs of another may come, in all layouts that are in use."""
    if out_features == width:
        yield torch.arange(width)
    head = width // heads
    shared = [count for count in range(1, heads) if heads % count == 0] if width % heads == 0 else []
    for count in shared:  # values of so many heads, each shared by some
        if out_features == count * head:
            yield torch.arange(out_features).view(count, 1, head).expand(-1, heads // count, -1).flatten()
    if out_features > width:
        yield torch.arange(out_features - width, out_features)  # queries, keys, values; or gate, up
    if out_features == 3 * width and width % heads == 0:  # queries, keys, values of one head after the other
        yield torch.arange(out_features).view(heads, 3, head)[:, 2].flatten()
    for count in shared:  # queries, then fewer keys and values
        if out_features == width + 2 * count * head:
            last = torch.arange(out_features - count * head, out_features)
            yield last.view(count, 1, head).expand(-1, heads // count, -1).flatten()


def _holds(block: Block, place: Fold, expected: Tensor) -> bool:
    """Whether the block gives the same with scales of 2 and 1/2 folded there."""
    reader = as_linear(block.module.get_submodule(place.readers[0]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 2, (reader.in_features,), generator=generator)
    if place.rows is not None:
        draws = draws[place.rows.unique(return_inverse=True)[1]]
    factors = torch.where(draws.bool(), 2.0, 0.5).to(reader.weight.device)
    with _kept(block, [place.source, *place.readers]):
        scaling = fold(block, [(place, factors)])
        for name, taken in scaling.rows.items():
            _scale(as_linear(block.module.get_submodule(name)), taken)
        for name, columns in scaling.columns.items():
            as_linear(block.module.get_submodule(name)).weight.data.mul_(columns)
        found = block.run(0)
    if place.offset:  # the weight + 1 is rounded, and so is what its readers make up for
        return _nearly_same(block, found, expected)
    return float((found != expected).float().mean()) <= TOLERATED


def _scale(linear: nn.Linear, factor: float | Tensor) -> None:
    """Multiply a linear's outputs by a number, or by one each."""
    linear.weight.data.mul_(factor[:, None] if isinstance(factor, Tensor) else factor)
    if linear.bias is not None:
        linear.bias.data.mul_(factor)


def _nearly_same(block: Block, found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs of a block's first call differ by little of what the block adds to its input."""
    before = block.hidden[0]
    added = expected - before if before.shape == expected.shape else expected  # a sliced stream may change its width
    return bool((found - expected).float().norm() <= NEARLY * added.float().norm())


@contextmanager
def _kept(block: Block, names: list[str]) -> Iterator[None]:
    """Gives the named modules their parameters back when the context ends."""
    modules = [block.module.get_submodule(name) for name in names]
    kept = [(p, p.data.clone()) for module in modules for p in module.parameters()]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def _outputs(root: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collects what the named modules last gave while the context is open."""
    given: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            given[name] = output

        return hook

    try:
        for name in names:
            handles.append(root.get_submodule(name).register_forward_hook(keep(name)))
        yield given
    finally:
        for handle in handles:
            handle.remove()
