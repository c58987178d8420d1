"""Walking a model: where its blocks and weight matrices are, and how each is fed and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.errors import UnfitError


class Inputs:
    """The calibration inputs of one matrix, or of several that share them; each statistic is computed once.

    Built from chunks (tokens, in); all statistics are float32 and over all tokens.
    """

    def __init__(self, chunks: list[Tensor]) -> None:
        self.chunks = [chunk.reshape(-1, chunk.shape[-1]) for chunk in chunks]

    @classmethod
    def of(cls, inputs: Inputs | Tensor | None) -> Inputs:
        """`inputs` as given to `layer`, where a plain tensor (tokens, in) is as good.

        Raises `ValueError` for `None`.
        """
        if inputs is None:
            raise ValueError("this technique needs calibration inputs, got none; pass a tensor (tokens, in)")
        return inputs if isinstance(inputs, Inputs) else cls([inputs])

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return sum(chunk.shape[0] for chunk in self.chunks)

    @cached_property
    def gram(self) -> Tensor:
        """The sum over tokens of x x^T, (in, in)."""
        width = self.chunks[0].shape[1]
        total = torch.zeros(width, width, device=self.chunks[0].device)
        for chunk in self.chunks:
            rows = chunk.float()
            total.addmm_(rows.T, rows)
        return total

    @cached_property
    def mean_abs(self) -> Tensor:
        """The mean of |x| per input channel, (in,)."""
        return torch.stack([chunk.float().abs().sum(0) for chunk in self.chunks]).sum(0) / self.tokens

    @cached_property
    def max_abs(self) -> Tensor:
        """The largest |x| per input channel, (in,)."""
        return torch.stack([chunk.float().abs().amax(0) for chunk in self.chunks]).amax(0)

    def rows(self, count: int) -> Tensor:
        """`count` inputs (count, in) in float32, evenly spread over all tokens."""
        places = torch.linspace(0, self.tokens - 1, min(count, self.tokens)).round().long()
        everything = torch.cat(self.chunks)
        return everything[places.to(everything.device)].float()


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and their name in the model.

    Found by structure: the module list as long as the config's number of layers that holds the most parameters.
    Raises `UnfitError` where there is none.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise UnfitError(f"no list of {depth} decoder blocks was found in a {type(model).__name__}")
    _, name, module = max(found, key=lambda entry: entry[0])
    return name, module


def is_matrix(module: nn.Module) -> bool:
    """Whether this is a plain weight matrix: `nn.Linear`, or the transposed `Conv1D` of GPT-2."""
    return type(module) in (nn.Linear, Conv1D)


def matrices(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The plain weight matrices within the blocks, by their names in the model; embeddings and head are left out."""
    prefix, layers = blocks(model)
    return [(f"{prefix}.{name}", _as_linear(m)) for name, m in layers.named_modules() if is_matrix(m)]


def _as_linear(module: nn.Module) -> nn.Linear:
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
    """Collects what goes into the named modules of `block` while the context is open."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name].append(args[0].detach())

        return hook

    try:
        for name in names:
            handles.append(block.get_submodule(name).register_forward_pre_hook(keep(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _block_calls(model: nn.Module, layers: nn.ModuleList, ids: Tensor) -> tuple[list[Tensor], list[list[dict]]]:
    """What the first block is fed, one tensor a sequence, and the keyword arguments of every block's call."""
    hidden: list[Tensor] = []
    keywords: list[list[dict]] = [[] for _ in layers]
    handles = []

    def note(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            first = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(first.detach())
            keywords[index].append(kwargs)

        return hook

    try:
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(note(index), with_kwargs=True))
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, keywords


def _run(block: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    output = block(hidden, **keywords)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@torch.no_grad()
def compress_blocks(
    model: nn.Module,
    layer: Callable[[nn.Linear, Inputs | Tensor | None], nn.Module],
    ids: Tensor | None,
    *,
    dense_inputs: bool = False,
) -> None:
    """Replace each weight matrix of `model` by `layer(matrix, its inputs)`, block after block.

    With `ids` (samples, length), each block is fed by the compressed blocks before it (by the dense ones if
    `dense_inputs`), and matrices that are fed the same tensors share one `Inputs`. Beside the model, the peak is
    one block, its inputs and the statistics that `layer` asks for. Embeddings, norms and head are left alone.
    """
    _, layers = blocks(model)
    hidden: list[Tensor] = []
    keywords: list[list[dict]] = [[] for _ in layers]
    if ids is not None:
        device = next(model.parameters()).device
        hidden, keywords = _block_calls(model, layers, ids.to(device))
    for index, block in enumerate(layers):
        names = [name for name, module in block.named_modules() if is_matrix(module)]
        outputs: list[Tensor] = []
        with captured_inputs(block, names) as seen:
            for call, arguments in enumerate(keywords[index]):
                output = _run(block, hidden[call], arguments)
                if dense_inputs:
                    outputs.append(output)
        shared: dict[int, Inputs] = {}
        for name in names:
            linear = _as_linear(block.get_submodule(name))
            inputs = None
            if ids is not None:
                if not seen[name]:
                    continue  # never called on this text (an idle expert): nothing is known about its inputs
                inputs = shared.setdefault(seen[name][0].data_ptr(), Inputs(seen[name]))
            new = layer(linear, inputs)
            if type(new) is nn.Linear:  # a Conv1D's matrix is a transposed view: kept so, it would run differently
                new.weight.data = new.weight.data.contiguous()  # once saved and loaded
            replace_module(block, name, new)
        seen.clear()
        if not dense_inputs:
            outputs = [_run(block, hidden[call], arguments) for call, arguments in enumerate(keywords[index])]
        hidden = outputs
        keywords[index].clear()
