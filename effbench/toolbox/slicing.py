"""A residual stream cut down to its principal directions, which are others at each norm.

Between two norms the stream changes its basis by a shortcut matrix, since what skips a sublayer has to meet what the
sublayer adds. Embeddings and head stay as they are, so that they may share their weights: the first block takes the
stream into its narrow basis and the last norm takes it back.
Source: SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.toolbox.stored import StoredModule
from effbench.toolbox.walk import blocks


def fixed_places(layers: nn.ModuleList) -> str | None:
    """Why none of these blocks can be left out; `None` where any can."""
    sliced = any(isinstance(block, SlicedBlock) for block in layers)
    return (
        "each block takes over the basis of the one before it: put this technique before slicegpt" if sliced else None
    )


class SlicedNorm(StoredModule):
    """A root-mean-square norm without weights of a stream that was `width` wide before it was cut."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width=width, eps=eps)
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)


class SlicedEnd(StoredModule):
    """The last norm: it takes the stream (..., narrow) back to its own width before weight and bias."""

    def __init__(self, width: int, narrow: int, eps: float, bias: bool) -> None:
        super().__init__(width=width, narrow=narrow, eps=eps, bias=bias)
        self.norm = SlicedNorm(width, eps)
        self.back = nn.Linear(narrow, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        back: Tensor = self.back(self.norm(x))
        return back


class SlicedBlock(StoredModule):
    """A block of a model over a narrow stream.

    config: of the model, as plain values, and `place` the block's in it; by these it is built before it is cut.
    norms, writers: in the block, the norm at which each basis begins, and the matrix whose outputs meet in the next
        one what skipped from there.
    width, narrow: of the stream before and after; `first` is whether the block is fed the wide one.
    """

    def __init__(
        self,
        config: dict[str, Any],
        place: int,
        norms: list[str],
        writers: list[str],
        width: int,
        narrow: int,
        first: bool,
    ) -> None:
        super().__init__(
            config=config, place=place, norms=norms, writers=writers, width=width, narrow=narrow, first=first
        )
        self.norms, self.writers = norms, writers
        with torch.device("meta"):
            known = AutoConfig.for_model(**config)
            self.inner: nn.Module = blocks(AutoModelForCausalLM.from_config(known, trust_remote_code=False))[1][place]
        self.shortcuts = nn.ModuleList(nn.Linear(narrow, narrow, bias=False) for _ in norms)
        """The changes of basis less the identity: what has to be added to what skips."""
        self.entrance = nn.Linear(width, narrow, bias=False) if first else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.entrance is not None:
            hidden_states = self.entrance(hidden_states)
        with ExitStack() as stack:
            for norm, writer, shortcut in zip(self.norms, self.writers, self.shortcuts, strict=True):
                stack.enter_context(bent(self.inner, norm, writer, _adding(shortcut)))
            return self.inner(hidden_states, *args, **kwargs)


def _adding(shortcut: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def add(fed: Tensor, given: Tensor) -> Tensor:
        total: Tensor = given + shortcut(fed)
        return total

    return add


@contextmanager
def bent(block: nn.Module, norm: str, writer: str, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While open, what `writer` gives is `change`(what `norm` was fed, what it gave)."""
    fed: list[Tensor] = []
    first, last = block.get_submodule(norm), block.get_submodule(writer)
    whole, written = first.forward, last.forward

    def keep(x: Tensor) -> Tensor:
        fed.append(x)
        normed: Tensor = whole(x)
        return normed

    def give(x: Tensor) -> Tensor:
        return change(fed.pop(), written(x))

    # in the way of the class's own: a tenth of what hooks cost that come and go with each token
    first.__dict__["forward"], last.__dict__["forward"] = keep, give
    try:
        yield
    finally:
        del first.__dict__["forward"], last.__dict__["forward"]
