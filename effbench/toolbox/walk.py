"""Walking a model: where its blocks and weight matrices are, and how each is fed and replaced."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.errors import UnfitError
from effbench.toolbox.architectures import blocks, is_matrix, matrix_names
from effbench.toolbox.decoding import takes
from effbench.toolbox.experts import ExpertList, expert_slices, unfold
from effbench.toolbox.inputs import Inputs

TOKENS_AT_ONCE = 2048
"""Sequences are read together up to so many tokens; one that is longer is read alone."""


def matrices(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The plain weight matrices within the blocks, by their names in the model; embeddings and head are left out.

    Experts that are kept together are taken apart first, which changes nothing that the model computes.
    Raises `UnfitError` where they are of an unknown kind, or where no blocks are found.
    """
    prefix, layers = blocks(model)
    unfold(layers, model.config)
    return [(f"{prefix}.{name}", as_linear(layers.get_submodule(name))) for name in matrix_names(layers)]


def weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What `matrices` would give, as tensors (out, in) and without touching the model."""
    prefix, layers = blocks(model)
    replaceable = set(matrix_names(layers))
    found = []
    for name, module in layers.named_modules(prefix=prefix):
        if name[len(prefix) + 1 :] in replaceable:
            found.append((name, as_linear(module).weight.detach()))
        found += [(f"{name}.{inside}", matrix) for inside, matrix in expert_slices(module)]
    return found


def as_linear(module: nn.Module) -> nn.Linear:
    """A linear over the very same weights; a `Conv1D` stores them (in, out) and is seen transposed."""
    if isinstance(module, nn.Linear):
        return module
    assert isinstance(module, Conv1D)
    linear = nn.Linear(module.nx, module.nf, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@contextmanager
def captured_inputs(block: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects what goes into the named modules of `block` while the context is open, in the order of their calls."""
    seen: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, []).append(args[0].detach())

        return hook

    try:
        for name in names:
            handles.append(block.get_submodule(name).register_forward_pre_hook(keep(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Block:
    """One of a model's blocks with all that it is called with, in calls of one or several calibration sequences."""

    name: str
    module: nn.Module
    hidden: list[Tensor]
    """What each call is fed, (sequences, tokens, width); after `advance` what it gave."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    advanced: bool = False

    def matrices(self) -> list[str]:
        """The names, within the block, of its plain weight matrices."""
        return matrix_names(self.module)

    def run(self, call: int, hidden: Tensor | None = None) -> Tensor:
        """What the block as it is now gives for a call, or for other `hidden` states with that call's arguments."""
        args, keywords = self.calls[call]
        output = self.module(self.hidden[call] if hidden is None else hidden, *args, **keywords)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def advance(self) -> None:
        """Put what the block as it is now gives in the place of what it is fed: the next block's inputs."""
        for call in range(len(self.hidden)):
            self.hidden[call] = self.run(call)
        self.advanced = True

    def inputs(self, names: list[str], only: Sequence[str] = (), *, advance: bool = False) -> dict[str, Inputs]:
        """The inputs of the named matrices, in the order of their first calls; those fed the same tensors share one.

        Matrices that are never called (idle experts) are left out. With `advance` the outputs are kept, too.
        """
        found: dict[str, Inputs] = {}
        for call in range(len(self.hidden)):
            with captured_inputs(self.module, names) as seen:
                output = self.run(call)
            if advance:
                self.hidden[call] = output
            known: dict[tuple[int, torch.Size], Inputs] = {}
            for name, tensors in seen.items():
                for tensor in (tensor for tensor in tensors if tensor.numel()):
                    key = tensor.data_ptr(), tensor.shape
                    own = found.setdefault(name, known.get(key) or Inputs(only=only))
                    if known.get(key) is not own:
                        own.add(tensor)
                        known[key] = own
        self.advanced = self.advanced or advance
        return found

    def groups(self, names: list[str], *, idle_together: bool = False) -> list[list[str]]:
        """The named matrices, those that are fed the same tensor together, in the order of their calls.

        What the first call does not reach (idle experts) comes last, one by one unless `idle_together`.
        """
        once = Block(self.name, self.module, self.hidden[:1], self.calls[:1])
        found = once.inputs(names, only=("max_abs",))
        together: dict[int, list[str]] = {}
        for name, inputs in found.items():
            together.setdefault(id(inputs), []).append(name)
        idle = [name for name in names if name not in found]
        return [*together.values(), *([idle] if idle_together and idle else ([name] for name in idle))]

    def replace(self, name: str, layer: Callable[..., nn.Module], inputs: Inputs | None) -> None:
        """Put `layer(matrix, inputs)` in the place of a matrix.

        Raises `UnfitError` with the matrix's name where it is unfit or where its inputs are not finite.
        """
        if inputs is not None and not inputs.finite:
            raise UnfitError(f"{self.name}.{name}: its calibration inputs are not all finite, so neither is the model")
        try:
            new = layer(as_linear(self.module.get_submodule(name)), inputs)
        except UnfitError as reason:
            raise UnfitError(f"{self.name}.{name}: {reason}") from reason
        if type(new) is nn.Linear:  # a Conv1D's matrix is a transposed view: kept so, it would run differently
            new.weight.data = new.weight.data.contiguous()  # once saved and loaded
        replace_module(self.module, name, new)


@torch.no_grad()
def walk(model: nn.Module, ids: Tensor | None) -> Iterator[Block]:
    """Each block of `model` in turn, ready to be changed in place; what was changed feeds the next.

    With `ids` (samples, length) the model reads them first, so that each block's calls are known. One set of hidden
    states is held for all blocks. A caller that has the dense blocks feed the next ones advances before it changes.
    """
    prefix, layers = blocks(model)
    unfold(layers, model.config)
    hidden: list[Tensor] = []
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in layers]
    if ids is not None:
        hidden = _read(model, layers, ids.to(next(model.parameters()).device), calls)
    for index, module in enumerate(layers):
        block = Block(f"{prefix}.{index}", module, hidden, calls[index])
        yield block
        if not block.advanced:
            block.advance()
        for part in module.modules():
            if isinstance(part, ExpertList):
                part.settle()
        calls[index].clear()
        _trim()


def _trim() -> None:
    """glibc: give back what was freed between tensors that stay, else a block's temporaries add up over the blocks."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read(model: nn.Module, layers: nn.ModuleList, ids: Tensor, calls: list[list]) -> list[Tensor]:
    """What the first block is fed, one tensor a call; the other arguments of all blocks' calls go to `calls`."""
    hidden: list[Tensor] = []
    handles = []

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            first = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(first.detach())
            calls[index].append((args[1:], kwargs))

        return hook

    # nobody reads the logits, which a large vocabulary makes larger than all else
    options = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(note(index), with_kwargs=True))
        for some in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
            model(input_ids=some, use_cache=False, **options)
    finally:
        for handle in handles:
            handle.remove()
    return hidden


@torch.no_grad()
def compress_blocks(
    model: nn.Module,
    layer: Callable[[nn.Linear, Inputs | Tensor | None], nn.Module],
    ids: Tensor | None,
    *,
    dense_inputs: bool = False,
    statistics: Sequence[str] = (),
    sequential: bool = False,
) -> None:
    """Replace each weight matrix of `model` by `layer(matrix, its inputs)`, block after block.

    With `ids` (samples, length), each block is fed by the compressed blocks before it (by the dense ones if
    `dense_inputs`), and matrices that are fed the same tensors share one `Inputs`. With `sequential`, a matrix is also
    fed by the compressed ones before it in its own block. Beside the model, the peak is one set of hidden states and
    one block's inputs, or only their `statistics` where those are named. Embeddings, norms and head are left alone.
    """
    for block in walk(model, ids):
        names = block.matrices()
        if ids is None:
            for name in names:
                block.replace(name, layer, None)
            continue
        for together in block.groups(names, idle_together=True) if sequential and not dense_inputs else [names]:
            for name, inputs in block.inputs(together, statistics, advance=dense_inputs).items():
                block.replace(name, layer, inputs)


__all__ = [
    "Block",
    "as_linear",
    "blocks",
    "captured_inputs",
    "compress_blocks",
    "is_matrix",
    "matrices",
    "matrix_names",
    "replace_module",
    "walk",
    "weights",
]
