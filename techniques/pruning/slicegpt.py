"""SliceGPT: the residual stream is turned to its principal directions at each norm, and the least of them are cut off.

All matrices that read or write the stream get smaller; heads, channels and cache stay as they are. What is saved is
less than the share that is cut, since each change of basis is stored as a matrix of its own. Embeddings and head stay
whole, unlike in the released code: two thin matrices lead from and to them, so that they may share their weights.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.technique import Data, System, Technique
from effbench.toolbox.checks import within
from effbench.toolbox.rotation import rms_parts
from effbench.toolbox.slicing import SlicedBlock, SlicedEnd, SlicedNorm, bent
from effbench.toolbox.structure import sublayers
from effbench.toolbox.walk import Block, as_linear, blocks, captured_inputs, matrices, replace_module, walk

MULTIPLE = 8
"""Widths are rounded down to one of it, as in the released code."""


@dataclass(frozen=True)
class Norm:
    """A norm taken apart: subtract the mean if it `centres`, divide by the root mean square, weight, bias."""

    name: str
    weight: Tensor
    bias: Tensor | None
    eps: float
    centres: bool


@dataclass(frozen=True)
class SliceGPT(Technique):
    """Cut the residual stream of all blocks down to its principal directions on calibration text.

    sliced: share of the stream's width that is cut off; what is left is rounded down to a multiple of 8.
    samples: sequences of calibration text, each as long as the model's context, at most 2048 tokens.
    """

    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv:2401.15024"

    sliced: float = 0.25
    samples: int = 128

    def __post_init__(self) -> None:
        within("sliced", self.sliced, 0, 1)
        within("samples", self.samples, 1)

    def unfit(self, system: System) -> str | None:
        if not matrices(system.model):
            return "no plain weight matrix is left to cut: put this technique before the one that packs them"
        try:
            for block in blocks(system.model)[1]:
                sublayers(block)
            width = len(last_norm(system.model).weight)
        except UnfitError as reason:
            return str(reason)
        return None if self._narrow(width) else f"sliced={self.sliced:g} leaves nothing of a stream {width} wide"

    def _narrow(self, width: int) -> int:
        left = round(width * (1 - self.sliced), 6)
        return int(left) // MULTIPLE * MULTIPLE if self.sliced else width

    @torch.no_grad()
    def apply(self, system: System, data: Data) -> System:
        model = system.model
        ids = data.calibration(self.samples, min(system.context, 2048))
        end = last_norm(model)
        width = len(end.weight)
        narrow = self._narrow(width)
        bases: list[Tensor] = []
        plans = []
        for block in walk(model, ids):
            norms = feeding_norms(block)
            _check_others(block, norms)
            parallel = _fed_alike(block, [norm.name for norm in norms])
            plans.append((norms, parallel))
            bases += _bases(block, norms, parallel, narrow)
            hidden = block.hidden
        bases.append(principal(hidden, narrow, end.centres))
        cut(model, plans, bases, end)
        return system


def cut(model: Any, plans: list[tuple[list[Norm], bool]], bases: list[Tensor], end: Norm) -> None:
    """Rewrite the model over the narrow stream, a block at a time. `bases` (width, narrow) are those of each norm."""
    name, layers = blocks(model)
    config = {"model_type": model.config.model_type, **model.config.to_diff_dict()}
    width, narrow = bases[0].shape
    rest = iter(zip(bases, bases[1:], strict=False))
    for place, (norms, parallel) in enumerate(plans):
        block = layers[place]
        parts = sublayers(block)
        dtype = as_linear(block.get_submodule(parts[0].writer)).weight.dtype
        steps = [next(rest)] * 2 if parallel else [next(rest), next(rest)]
        for part, norm, (basis, following) in zip(parts, norms, steps, strict=True):
            for reader in part.readers:
                linear = as_linear(block.get_submodule(reader))
                weight = linear.weight.float() * norm.weight
                bias = None if linear.bias is None else linear.bias.float()
                if norm.bias is not None:
                    moved = linear.weight.float() @ norm.bias
                    bias = moved if bias is None else bias + moved
                replace_module(block, reader, _linear(weight @ basis, bias, dtype))
            linear = as_linear(block.get_submodule(part.writer))
            into = centred(following, norm.centres).T
            bias = None if linear.bias is None else into @ linear.bias.float()
            replace_module(block, part.writer, _linear(into @ linear.weight.float(), bias, dtype))
            replace_module(block, norm.name, SlicedNorm(width, norm.eps))
        used = 1 if parallel else 2
        with torch.device("meta"):
            first = place == 0
            written = [part.writer for part in parts][:used]
            new = SlicedBlock(config, place, [n.name for n in norms][:used], written, width, narrow, first)
        new.inner = block
        for shortcut, (basis, following) in zip(new.shortcuts, steps, strict=False):
            change = centred(following, norms[0].centres).T @ basis
            change.diagonal().sub_(1)
            shortcut.weight = nn.Parameter(change.to(dtype), requires_grad=False)
        if first:
            new.entrance = _linear(centred(bases[0], norms[0].centres).T, None, dtype)
        replace_module(model, f"{name}.{place}", new.eval())
    with torch.device("meta"):
        last = SlicedEnd(width, narrow, end.eps, end.bias is not None)
    last.back = _linear(end.weight[:, None] * bases[-1], end.bias, model.dtype)
    replace_module(model, end.name, last)


def principal(hidden: list[Tensor], narrow: int, centres: bool) -> Tensor:
    """The directions (width, narrow) that carry most of the stream; not of its deviations from the mean over tokens."""
    gram: Any = 0
    for tensor in hidden:
        rows = tensor.flatten(0, -2).double()
        rows = rows - rows.mean(-1, keepdim=True) if centres else rows
        gram = gram + rows.T @ rows
    if not bool(gram.isfinite().all()):
        raise UnfitError("what flows through the model on calibration text is not finite")
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :narrow].float().contiguous()


def centred(basis: Tensor, centres: bool) -> Tensor:
    """A basis (width, narrow) that takes from the stream its mean over channels first, as LayerNorm would."""
    return basis - basis.mean(0) if centres else basis


def _bases(block: Block, norms: list[Norm], parallel: bool, narrow: int) -> list[Tensor]:
    """The bases of a block's norms, found on the stream as cut before; leaves what the cut block gives."""
    centres = norms[0].centres
    found = [principal(block.hidden, narrow, centres)]
    for call, tensor in enumerate(block.hidden):
        block.hidden[call] = _projected(tensor, found[0], centres)
    if parallel:
        block.advance()
        return found
    fed: list[Tensor] = []
    for call in range(len(block.hidden)):
        with captured_inputs(block.module, [norms[1].name]) as seen:
            block.run(call)
        fed += seen[norms[1].name]
    second = principal(fed, narrow, centres)
    del fed
    writer = sublayers(block.module)[0].writer
    with bent(block.module, norms[0].name, writer, lambda x, y: _projected(x + y, second, centres) - x):
        block.advance()
    return [*found, second]


def _projected(x: Tensor, basis: Tensor, centres: bool) -> Tensor:
    return (x.float() @ centred(basis, centres) @ basis.T).to(x.dtype)


def last_norm(model: Any) -> Norm:
    """The one norm behind the blocks.

    Raises `UnfitError` where there is none or several.
    """
    inside = set(blocks(model)[1].modules())
    found = [norm for name, module in model.named_modules() if module not in inside and (norm := _norm(name, module))]
    if len(found) != 1:
        raise UnfitError(f"the stream must end in one norm whose weights can be moved, {len(found)} were found")
    return found[0]


def feeding_norms(block: Block) -> list[Norm]:
    """The norms that feed attention and feedforward.

    Raises `UnfitError` where anything else feeds their matrices.
    """
    named = [norm for name, module in block.module.named_modules() if (norm := _norm(name, module))]
    readers = [part.readers for part in sublayers(block.module)]
    given: dict[str, Tensor] = {}

    def keeping(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            given[name] = output

        return hook

    handles = [block.module.get_submodule(norm.name).register_forward_hook(keeping(norm.name)) for norm in named]
    try:
        with captured_inputs(block.module, [name for names in readers for name in names]) as seen:
            block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    of = {given[norm.name].data_ptr(): norm for norm in named if norm.name in given}
    found = [{seen[name][0].data_ptr() for name in names} for names in readers]
    if any(len(places) != 1 or not places <= of.keys() for places in found) or found[0] == found[1]:
        raise UnfitError(f"{block.name}: attention and feedforward are not each fed by a norm of its own")
    return [of[places.pop()] for places in found]


def _check_others(block: Block, norms: list[Norm]) -> None:
    """Raises `UnfitError` for weights of the stream that are neither matrices, nor norms that feed them."""
    parts = sublayers(block.module)
    known = {*(norm.name for norm in norms), *(name for part in parts for name in (*part.readers, part.writer))}
    width = len(norms[0].weight)
    for name, parameter in block.module.named_parameters():
        if name.rpartition(".")[0] not in known and width in parameter.shape:
            raise UnfitError(f"{block.name}.{name} belongs to the stream beside attention, feedforward and their norms")


def _fed_alike(block: Block, names: list[str]) -> bool:
    """Whether both norms read the stream as the block is fed it, side by side."""
    with captured_inputs(block.module, names) as seen:
        block.run(0)
    return torch.equal(*(seen[name][0].flatten() for name in names))


def _norm(name: str, module: nn.Module) -> Norm | None:
    """A norm of the stream, taken apart; `None` for any other module."""
    if type(module) is nn.LayerNorm and module.elementwise_affine:
        bias = None if module.bias is None else module.bias.detach().float()
        return Norm(name, module.weight.detach().float(), bias, module.eps, True)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or list(module.children()):
        return None
    parts = rms_parts(module)
    return None if parts is None else Norm(name, parts[0].float(), None, parts[1], False)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return new
