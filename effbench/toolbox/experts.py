"""Experts that a model keeps together in 3-D tensors, taken apart into one matrix each.

A walk over linear layers passes such tensors by, and most weights of today's mixtures of experts are in them. Taken
apart they stay views of the same memory, and compute the same: how a kind of experts keeps its matrices and how it is
called is found by trial, and a kind that computes anything else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from effbench.errors import UnfitError
from effbench.toolbox.stored import StoredModule

FIRST = ("gate_up_proj", "up_proj")
"""What a projection that an expert begins with is called: gates and what they multiply in one matrix, or no gates."""
LAST = "down_proj"
KINDS = "transformers.models."
"""Where experts may come from: a saved folder must not be able to name arbitrary code."""
SAME = 0.02
"""How far outputs may move, relative to their size: what bfloat16 makes of another order of sums."""


@dataclass(frozen=True)
class Layout:
    """How a kind of experts keeps its matrices and is called.

    first: the name of the first projection.
    transposed: whether tensors are (experts, in, out) instead of (experts, out, in).
    routed: whether it is told which experts each token goes to, with which weights; if not, it is fed as many rows
        for each expert in turn, zeros where a token does not go there.
    """

    first: str
    transposed: bool
    routed: bool


class ExpertList(StoredModule):
    """Experts with a matrix each, in two lists: the first projections, by the name that they have, and `down_proj`.

    kind: the transformers class whose place this takes, as `module:name`, which says what gates do.
    config: plain values, from which that class is built.
    count: of experts; `in_features`, `between` and `inner` are the widths before, after the first projection and
        before the last.
    """

    def __init__(
        self,
        kind: str,
        config: dict[str, Any],
        first: str,
        count: int,
        in_features: int,
        between: int,
        inner: int,
        bias: bool = False,
        routed: bool = True,
    ) -> None:
        super().__init__(
            kind=kind,
            config=config,
            first=first,
            count=count,
            in_features=in_features,
            between=between,
            inner=inner,
            bias=bias,
            routed=routed,
        )
        self.first, self.routed = first, routed
        self.shell = _shell(kind, config)
        """The original without its matrices: it knows what happens between them."""
        setattr(self, first, nn.ModuleList(nn.Linear(in_features, between, bias=bias) for _ in range(count)))
        self.down_proj = nn.ModuleList(nn.Linear(inner, in_features, bias=bias) for _ in range(count))

    @classmethod
    def of(cls, experts: nn.Module, layout: Layout, config: Any) -> ExpertList:
        """The list over views of the very same tensors."""
        named = dict(experts.named_parameters(recurse=False))
        first, last = (_stack(named[name], layout.transposed) for name in (layout.first, LAST))
        kind = f"{type(experts).__module__}:{type(experts).__qualname__}"
        values = {"model_type": config.model_type, **config.to_diff_dict()}
        bias = f"{layout.first}_bias" in named
        with torch.device("meta"):
            count, between, width = first.shape
            new = cls(kind, values, layout.first, count, width, between, last.shape[2], bias, layout.routed)
        for name, parameter in (*experts.named_parameters(), *experts.named_buffers()):
            if name.partition(".")[0] not in (layout.first, LAST, f"{layout.first}_bias", f"{LAST}_bias"):
                _put(new.shell, name, parameter)
        for name, stack in ((layout.first, first), (LAST, last)):
            linears: Any = new.get_submodule(name)
            for place, linear in enumerate(linears):
                linear.weight = nn.Parameter(stack[place], requires_grad=False)
                if bias:
                    linear.bias = nn.Parameter(named[f"{name}_bias"].detach()[place], requires_grad=False)
        return new.train(experts.training)

    def forward(self, hidden_states: Tensor, *args: Tensor, **keywords: Tensor) -> Tensor:
        """The experts' outputs for tokens (tokens, in), summed by their weights (tokens, chosen) if `routed`."""
        if not self.routed:
            return self._each_its_rows(hidden_states)
        index, weights = (*args, *keywords.values())
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen = index.shape[-1]
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=len(self.down_proj)).tolist()
        total = torch.zeros_like(rows, dtype=torch.float32)
        for place, slots in enumerate(order.split(counts)[: len(self.down_proj)]):
            if len(slots):
                tokens = slots // chosen
                given = self._expert(place, rows[tokens]) * weights.flatten()[slots, None]
                total = total.index_add(0, tokens, given.float())
        return total.to(hidden_states.dtype).view_as(hidden_states)

    def _each_its_rows(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.view(len(self.down_proj), -1, hidden_states.shape[-1])
        outputs = []
        for place, own in enumerate(rows):
            fed = own.any(-1).nonzero().flatten()  # zeros in, zeros out: there are no biases
            given = self._expert(place, own[fed]).to(own.dtype)
            outputs.append(torch.zeros_like(own).index_put((fed,), given))
        return torch.cat(outputs)

    def _expert(self, place: int, x: Tensor) -> Tensor:
        shell: Any = self.shell
        lists: Any = self.get_submodule(self.first)
        between = lists[place](x)
        if self.first != FIRST[0]:
            inner = shell.act_fn(between)
        elif hasattr(shell, "_apply_gate"):
            inner = shell._apply_gate(between)
        else:
            gate, up = between.chunk(2, -1)
            inner = up * shell.act_fn(gate)
        given: Tensor = self.down_proj[place](inner)
        return shell.post_expert_norm(given) if getattr(shell, "has_post_expert_norm", False) else given

    def settle(self) -> None:
        """Let go of tensors that only some experts still look at: these get memory of their own."""
        for name in (self.first, LAST):
            linears: Any = self.get_submodule(name)
            plain = [linear for linear in linears if type(linear) is nn.Linear]
            if len(plain) == len(linears) and len({one.weight.untyped_storage().data_ptr() for one in plain}) == 1:
                continue  # all still look at what they were taken from
            for linear in plain:
                if linear.weight.untyped_storage().nbytes() > linear.weight.nbytes:
                    linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)


def unfold(root: nn.Module, config: Any) -> None:
    """Take all experts within `root` apart that are kept in 3-D tensors; what it computes stays the same.

    `config` is the model's. Raises `UnfitError` for a kind of experts that does not compute what is known of experts.
    """
    config = config.get_text_config(decoder=True)
    for name, module in [(name, module) for name, module in root.named_modules() if _stacked(module)]:
        layout = _layout(module, config)
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, ExpertList.of(module, layout, config))


def expert_slices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices of experts that are still together, as views (out, in), by the names they have once taken apart."""
    if not _stacked(module):
        return
    named = dict(module.named_parameters(recurse=False))
    first = next(name for name in FIRST if name in named)
    transposed = _is_transposed(module, named[first], named[LAST])
    for name in (first, LAST):
        for place, matrix in enumerate(_stack(named[name], transposed)):
            yield f"{name}.{place}", matrix


def expert_of(root: nn.Module, name: str) -> tuple[str, str] | None:
    """The list and the number of the expert that the matrix called `name` within `root` is of; `None` for others."""
    owner, *rest = name.rsplit(".", 2)
    known = len(rest) == 2 and isinstance(root.get_submodule(owner), ExpertList)
    return (owner, rest[1]) if known else None


def _stacked(module: nn.Module) -> bool:
    own = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    return own.get(LAST) == 3 and any(own.get(name) == 3 for name in FIRST)


def _stack(tensor: Tensor, transposed: bool) -> Tensor:
    """(experts, out, in), whichever way round they are kept."""
    return tensor.detach().transpose(1, 2) if transposed else tensor.detach()


def _is_transposed(module: Any, first: Tensor, last: Tensor) -> bool:
    known = getattr(module, "is_transposed", None)
    return bool(last.shape[2] == first.shape[1] != first.shape[2] if known is None else known)


def _layout(module: nn.Module, config: Any) -> Layout:
    named = dict(module.named_parameters(recurse=False))
    first = next(name for name in FIRST if name in named)
    routed = len(inspect.signature(module.forward).parameters) > 1
    layout = Layout(first, _is_transposed(module, named[first], named[LAST]), routed)
    kind = type(module)
    if kind not in _tried:
        _tried[kind] = kind.__module__.startswith(KINDS) and _computes(module, layout, config)
    if not _tried[kind]:
        raise UnfitError(f"its experts, {kind.__name__}, compute in a way that is not known, so they stay together")
    return layout


_tried: dict[type, bool] = {}
"""Kinds of experts, and whether they compute the same once taken apart."""


@torch.no_grad()
def _computes(module: nn.Module, layout: Layout, config: Any) -> bool:
    """Whether experts give the same once taken apart, on random tokens."""
    tensor = module.get_parameter(LAST)
    generator = torch.Generator().manual_seed(0)
    try:
        apart = ExpertList.of(module, layout, config)
        width, count = apart.options["in_features"], apart.options["count"]
        rows = torch.randn(4 * count, width, generator=generator).to(tensor)
        if layout.routed:
            index = torch.rand(len(rows), count, generator=generator).topk(min(2, count)).indices.to(tensor.device)
            weights = torch.rand(index.shape, generator=generator).to(tensor)
            expected, found = module(rows, index, weights), apart(rows, index, weights)
        else:
            rows[::3] = 0
            expected, found = module(rows), apart(rows)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return False
    return bool((found - expected).float().norm() <= SAME * expected.float().norm())


@cache
def _kind(name: str) -> Any:
    module, _, qualified = name.partition(":")
    found = getattr(import_module(module), qualified, None) if module.startswith(KINDS) else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name} is no module of transformers' models")
    return found


def _shell(kind: str, config: dict[str, Any]) -> nn.Module:
    """The class called `kind` built from a config, without its matrices."""
    shell: nn.Module = _kind(kind)(AutoConfig.for_model(**config))
    for name in (*FIRST, LAST):
        shell._parameters.pop(name, None)
        shell._parameters.pop(f"{name}_bias", None)
    return shell


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = root.get_submodule(parent)
    kept: dict[str, Any] = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
    kept[leaf] = tensor
