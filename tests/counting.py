"""The easiest text that takes attention: counting from a random word in steps of a random size, round a circle."""

import numpy as np
import torch
from torch import Tensor

from effbench.data import Windows

WORDS = 40


def counting(batches: int, seed: int = 0) -> list[Tensor]:
    """Batches of token ids (8, 24)."""
    return [torch.from_numpy(CountingSource().training(8, 24, 1000 * seed + batch)) for batch in range(batches)]


class CountingSource:
    """A source of such text for techniques."""

    def evaluation(self, length: int, limit: int | None) -> Windows:
        """Nothing here is evaluated."""
        raise NotImplementedError

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        """Token ids (count, length)."""
        random = np.random.default_rng(seed)
        start, step = random.integers(0, WORDS, (count, 1)), random.integers(1, 5, (count, 1))
        return 3 + (start + step * np.arange(length)) % WORDS
