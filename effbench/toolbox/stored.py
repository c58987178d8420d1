"""Modules that can be saved as options and tensors, and built again from them."""

from __future__ import annotations

from collections.abc import Iterable
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

    @property
    def simulated(self) -> str | None:
        """What it only imitates where its tensors are, as half a sentence: its time there says nothing."""
        return None

    @property
    def unpacked(self) -> str | None:
        """Why, where its tensors are, its weights are unpacked for a single row, too: it has no kernel there."""
        return None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def remarks(modules: Iterable[nn.Module], kind: str) -> list[str]:
    """What stored modules say about themselves, `kind` being "simulated" or "unpacked"; each sentence once."""
    said = {getattr(module, kind) for module in modules if isinstance(module, StoredModule)}
    return sorted(said - {None})
