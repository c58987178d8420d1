"""What goes into a weight matrix on calibration text, and statistics of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

GRAM_BLOCK = 512
"""Of a Gram matrix, blocks of so many rows are summed up from the diagonal on: five eighths of the products at 2048."""

SPREAD = 512
"""About how many inputs are kept of all, where some will do."""


class Inputs:
    """The calibration inputs of one matrix, or of several that share them; each statistic is computed once.

    Built from chunks (tokens, in); all statistics are float32 and over all tokens. With `only`, the statistics named
    are summed up while chunks come, and the chunks are dropped: the memory does not grow with the tokens. Among these
    names, "spread" keeps what `spread` gives.
    """

    def __init__(self, chunks: Iterable[Tensor] = (), only: Sequence[str] = ()) -> None:
        self.chunks: list[Tensor] = []
        self.tokens = 0
        """How many tokens were seen."""
        self._only = tuple(only)
        self._stride = 1
        self._found: dict[str, Tensor] = {}
        for chunk in chunks:
            self.add(chunk)

    def add(self, chunk: Tensor) -> None:
        """Take in more inputs (..., in)."""
        chunk = chunk.reshape(-1, chunk.shape[-1])
        self.tokens += chunk.shape[0]
        if not self._only:
            self.chunks.append(chunk)
            self._found.clear()
        for name in self._only:
            if name == "spread":
                self._keep(chunk)
            else:
                self._gather(name, chunk)

    @classmethod
    def of(cls, inputs: Inputs | Tensor | None) -> Inputs:
        """`inputs` as given to `layer`, where a plain tensor (tokens, in) is as good.

        Raises `ValueError` for `None`.
        """
        if inputs is None:
            raise ValueError("this technique needs calibration inputs, got none; pass a tensor (tokens, in)")
        return inputs if isinstance(inputs, Inputs) else cls([inputs])

    @property
    def gram(self) -> Tensor:
        """The sum over tokens of x x^T, (in, in)."""
        found = self._statistic("gram")
        for start in range(GRAM_BLOCK, len(found), GRAM_BLOCK):
            found[start : start + GRAM_BLOCK, :start] = found[:start, start : start + GRAM_BLOCK].T
        return found

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x| per input channel, (in,)."""
        return self._statistic("mean_abs") / self.tokens

    @property
    def max_abs(self) -> Tensor:
        """The largest |x| per input channel, (in,)."""
        return self._statistic("max_abs")

    @property
    def square_sum(self) -> Tensor:
        """The sum over tokens of x^2 per input channel, (in,)."""
        return self._statistic("square_sum")

    @property
    def finite(self) -> bool:
        """Whether all inputs are finite numbers, as far as what is kept of them shows."""
        return all(bool(kept.isfinite().all()) for kept in (*self._found.values(), *self.chunks))

    def rows(self, count: int) -> Tensor:
        """`count` inputs (count, in) in float32, evenly spread over all tokens; needs the chunks."""
        places = torch.linspace(0, self.tokens - 1, min(count, self.tokens)).round().long()
        everything = torch.cat(self.chunks)
        return everything[places.to(everything.device)].float()

    def spread(self) -> Tensor:
        """About 512 inputs (count, in), or all if there are fewer, evenly spread over all tokens, in float32."""
        if self._only:
            return torch.cat(self.chunks).float()
        stride, picked, start = max(1, self.tokens // SPREAD), [], 0
        for chunk in self.chunks:
            picked.append(chunk[start::stride].float())
            start = (start - len(chunk)) % stride
        return torch.cat(picked)

    def _keep(self, chunk: Tensor) -> None:
        """Keep some of what comes, less often the more there is: 512 to 1023 in all."""
        self.chunks.append(chunk[(len(chunk) - self.tokens) % self._stride :: self._stride].clone())
        while sum(map(len, self.chunks)) >= 2 * SPREAD:
            self._stride *= 2
            self.chunks = [torch.cat(self.chunks)[::2].clone()]

    def _statistic(self, name: str) -> Tensor:
        if name not in self._found:
            if self._only:
                raise ValueError(f"only {', '.join(self._only)} of the inputs were kept; add {name} to `statistics`")
            for chunk in self.chunks:
                self._gather(name, chunk)
        return self._found[name]

    def _gather(self, name: str, chunk: Tensor) -> None:
        """Add `chunk` to what is known of it: a sum, or for `max_abs` the largest."""
        rows = chunk.float()
        width, found = rows.shape[1], self._found
        if name == "gram":
            gram = found.setdefault(name, rows.new_zeros(width, width))
            for start in range(0, width, GRAM_BLOCK):  # what is below is the same, and filled in when it is read
                gram[start : start + GRAM_BLOCK, start:].addmm_(rows[:, start : start + GRAM_BLOCK].T, rows[:, start:])
        elif name == "mean_abs":
            found.setdefault(name, rows.new_zeros(width)).add_(rows.abs().sum(0))
        elif name == "square_sum":
            found.setdefault(name, rows.new_zeros(width)).add_(rows.square().sum(0))
        elif len(rows):
            found[name] = torch.maximum(found.get(name, rows.new_zeros(width)), rows.abs().amax(0))
