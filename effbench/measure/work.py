"""The least work of generating: bytes that have to be read and operations that have to be done, counted as it is done.

Bytes are those of each module that runs, once in each pass, and of the cache behind it; of an embedding only the rows
that are looked up. Operations are those of the matrix products and of attention that torch dispatches; a packed layer
whose kernel torch does not see counts as the product of the matrix that it stands for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Cache

from effbench.measure.limits import Work
from effbench.measure.memory import cache_bytes, storages
from effbench.technique import System
from effbench.toolbox.stored import StoredModule


def count(system: System, prompt: Tensor, new_tokens: int) -> tuple[Work, Work]:
    """The work up to the first new token of `prompt` (batch, tokens), and that of each one after it."""
    first, everything = _counted(system, prompt, 1), _counted(system, prompt, new_tokens)
    return first, everything.per(new_tokens - 1, first)


def _counted(system: System, prompt: Tensor, new_tokens: int) -> Work:
    operations = _Operations()
    with ExitStack() as stack:
        passes = [stack.enter_context(_watched(model, operations)) for model in (system.model, *system.parts.values())]
        stack.enter_context(operations)
        system.generate(system, prompt, new_tokens)
    return Work(float(sum(found.bytes for found in passes)), dict(operations.counts))


class _Operations(TorchDispatchMode):
    """Counts what is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in flop_registry:  # whole as `linear` it would not be seen as a product
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        tensors = [item for item in args if isinstance(item, Tensor)]
        if packet.__name__.startswith("_scaled_dot_product"):
            self.add(tensors[0], _attention(*(item.shape for item in tensors[:3])))
        elif packet in flop_registry:
            self.add(tensors[-1], float(flop_registry[packet](*args, **(kwargs or {}), out_val=result)))
        elif packet is torch.ops.aten._int_mm:
            self.add(tensors[0], 2 * tensors[0].shape[0] * tensors[0].shape[1] * tensors[1].shape[1])
        return result

    def add(self, factor: Tensor, count: float) -> None:
        """So many operations with factors such as this one."""
        self.counts[str(factor.dtype).removeprefix("torch.")] += float(count)

    @property
    def total(self) -> float:
        """Those of all dtypes."""
        return sum(self.counts.values())


def _attention(queries: torch.Size, keys: torch.Size, values: torch.Size) -> float:
    """Of two products, from the shapes (..., heads, tokens, width); keys and values may have fewer heads."""
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


@dataclass
class _Passes:
    """The bytes of all passes over a model so far."""

    bytes: float = 0.0
    touched: dict[int, int] = field(default_factory=dict)
    looked_up: float = 0.0


@contextmanager
def _watched(model: nn.Module, operations: _Operations) -> Iterator[_Passes]:
    """Counts every pass over a model: what its modules store, and its cache."""
    found = _Passes()
    handles = [
        model.register_forward_pre_hook(lambda *_: _begin(found)),
        model.register_forward_hook(lambda _, args, kwargs, output: _end(found, args, kwargs), with_kwargs=True),
    ]
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda _, args, output: _look_up(found, output)))
        elif own:
            handles.append(module.register_forward_pre_hook(lambda *_, own=own: found.touched.update(storages(own))))
        features = getattr(module, "options", {}) if isinstance(module, StoredModule) else {}
        if {"in_features", "out_features"} <= features.keys():
            matrix = features["in_features"] * features["out_features"]
            before: list[float] = []
            handles.append(module.register_forward_pre_hook(lambda *_, b=before: b.append(operations.total)))
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, b=before, m=matrix: _unseen(operations, b.pop(), args[0], m)
                )
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _begin(found: _Passes) -> None:
    found.touched, found.looked_up = {}, 0


def _look_up(found: _Passes, rows: Tensor) -> None:
    found.looked_up += rows.nbytes


def _end(found: _Passes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    caches = [item for item in (*args, *kwargs.values()) if isinstance(item, Cache)]
    found.bytes += sum(found.touched.values()) + found.looked_up + sum(map(cache_bytes, caches))


def _unseen(operations: _Operations, before: float, inputs: Tensor, matrix: int) -> None:
    """A layer in which no product was seen."""
    if operations.total == before:
        operations.add(inputs, 2 * matrix * (inputs.numel() // inputs.shape[-1]))
