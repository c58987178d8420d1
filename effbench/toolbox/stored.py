"""Modules that can be saved as options and tensors, and built again from them."""

from __future__ import annotations

from typing import Any

from torch import nn


class StoredModule(nn.Module):
    """A module whose constructor takes only plain values and makes buffers or parameters of the right shape.

    `options` are those values; together with the state they are all that is needed to build it again, so no
    pickle is. What a module computes with has to be in its registered parameters and buffers.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
