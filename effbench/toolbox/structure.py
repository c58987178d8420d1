"""Removing whole parts of a model: blocks, attention heads, channels of a feedforward.

What is left is an ordinary smaller model. Its config is changed where a config can say so; where it cannot, as for
blocks of unlike widths, the saved structure names each matrix that differs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from effbench.errors import UnfitError
from effbench.toolbox.architectures import ATTENTION, FEEDFORWARD, NUMBERED, blocks, is_matrix
from effbench.toolbox.experts import ExpertList
from effbench.toolbox.stored import StoredModule
from effbench.toolbox.walk import as_linear, replace_module

COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "embed_dim", "split_size")
"""What an attention module may know of its own size, all in proportion to its heads."""


@dataclass(frozen=True)
class Units:
    """What can be removed from a block one by one: heads (with all that share their keys and values), or channels.

    owner: the module of the block that they are in.
    rows: for each matrix that writes them, the rows of each unit, (units, rows of one).
    reader: the matrix that reads them, and `columns` its columns of each unit, (units, columns of one).
    """

    owner: str
    rows: dict[str, Tensor]
    reader: str
    columns: Tensor

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.columns)

    def weights(self, block: nn.Module) -> int:
        """Weights of one unit, biases left out."""
        inputs = {name: as_linear(block.get_submodule(name)).in_features for name in self.rows}
        written = sum(rows.shape[1] * inputs[name] for name, rows in self.rows.items())
        return written + self.columns.shape[1] * as_linear(block.get_submodule(self.reader)).out_features


@dataclass(frozen=True)
class Sublayer:
    """The matrices of attention or feedforward that read the residual stream, and the one that writes to it."""

    readers: tuple[str, ...]
    writer: str


def sublayers(block: nn.Module) -> tuple[Sublayer, Sublayer]:
    """Attention and feedforward of a block.

    Raises `UnfitError` where they are not made of the plain matrices that are known.
    """
    found = []
    for known, what in ((ATTENTION, "attention"), (FEEDFORWARD, "feedforward")):
        owner, readers, writer = _find(block, known, what)
        prefix = f"{owner}." if owner else ""
        found.append(Sublayer(tuple(prefix + name for name in readers), prefix + writer))
    return found[0], found[1]


def keep_blocks(model: Any, places: Sequence[int]) -> None:
    """Leave only the blocks at `places`, renumbered so that caches have no gaps, and a config that says so.

    Raises `UnfitError` where a block's number makes it what it is and no config says what is left.
    """
    name, layers = blocks(model)
    depth, kept = len(layers), [layers[place] for place in places]
    replace_module(model, name, nn.ModuleList(kept))
    for place, block in enumerate(kept):
        module: Any
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for key, value in list(vars(model.config).items()):
        if key in NUMBERED and value is not None:
            setattr(model.config, key, [new for new, place in enumerate(places) if place in value])
        elif isinstance(value, list | tuple) and len(value) == depth and "layer" in key:
            setattr(model.config, key, [value[place] for place in places])
    model.config.num_hidden_layers = len(kept)
    with torch.device("meta"):
        twin = blocks(AutoModelForCausalLM.from_config(model.config, trust_remote_code=False))[1]
    if not all(map(_alike, kept, twin)):
        raise UnfitError("a block's number makes it what it is, and no config says so of those that would be left")


def _alike(block: nn.Module, twin: nn.Module) -> bool:
    """Whether the architecture's own modules in a block are those of another; what was put into it may differ."""
    own = dict(twin.named_modules())
    put = [f"{name}." for name, module in block.named_modules() if isinstance(module, StoredModule)]
    return all(
        type(own.get(name)) is type(module)
        for name, module in block.named_modules()
        if type(module).__module__.startswith("transformers.models.") and not name.startswith(tuple(put))
    )


def heads(block: nn.Module) -> Units:
    """The heads of a block; with grouped queries, each key head with its query heads.

    Raises `UnfitError` where attention is of a form in which whole heads are not told apart.
    """
    owner, writers, reader = _find(block, ATTENTION, "attention")
    attention: Any = block.get_submodule(owner)
    if writers == ("qkv_proj",):
        kind = type(attention).__name__
        raise UnfitError(f"a {kind} takes its number of heads from the config, where all blocks have as many")
    size = int(getattr(attention, "head_dim", 0) or getattr(attention, "head_size", 0))
    if not size:
        raise UnfitError(f"a {type(attention).__name__} does not say how wide its heads are")
    known = {f"{name}.{kind}" for name in (*writers, reader) for kind in ("weight", "bias")}
    for name, parameter in attention.named_parameters():
        if name not in known and parameter.shape != (size,):
            raise UnfitError(f"attention's {name} spans several heads, so that none can be removed by itself")
    linears = {name: as_linear(attention.get_submodule(name)) for name in writers}
    width = as_linear(attention.get_submodule(reader)).in_features
    outputs = [linear.out_features for linear in linears.values()]
    keys = outputs[1] if len(writers) == 3 else (sum(outputs) - width) // 2
    shared = keys // size
    fits = outputs in ([width, keys, keys], [width + 2 * keys])
    if not fits or not shared or keys % size or width % keys:
        raise UnfitError("attention's matrices are of sizes in which whole heads are not told apart")
    if len(writers) == 3:
        rows = {name: torch.arange(linear.out_features).view(shared, -1) for name, linear in linears.items()}
    elif writers == ("c_attn",):  # all queries, all keys, all values
        queries, others = torch.arange(width).view(shared, -1), torch.arange(width, outputs[0]).view(2, shared, size)
        rows = {"c_attn": torch.cat([queries, *others], 1)}
    else:  # the queries, the key and the value of one key head after the other
        rows = {writers[0]: torch.arange(outputs[0]).view(shared, -1)}
    return _units(owner, rows, reader, torch.arange(width).view(shared, -1))


def channels(block: nn.Module) -> Units:
    """The channels of a block's feedforward.

    Raises `UnfitError` where it is not made of the plain matrices that are known.
    """
    owner, writers, reader = _find(block, FEEDFORWARD, "feedforward")
    width = as_linear(block.get_submodule(owner).get_submodule(reader)).in_features
    places = torch.arange(width)[:, None]
    fused = writers == ("gate_up_proj",)  # all gates first
    rows = torch.cat([places, places + width], 1) if fused else places
    return _units(owner, {name: rows.clone() for name in writers}, reader, places)


def keep_units(block: nn.Module, units: Units, kept: Tensor) -> None:
    """Leave only the `kept` units, by ascending number, in a block; its matrices are new and hold nothing else."""
    for name, rows in units.rows.items():
        linear = as_linear(block.get_submodule(name))
        chosen = rows[kept].flatten().sort().values.to(linear.weight.device)
        replace_module(
            block, name, _linear(linear.weight[chosen], None if linear.bias is None else linear.bias[chosen])
        )
    reader = as_linear(block.get_submodule(units.reader))
    chosen = units.columns[kept].flatten().to(reader.weight.device)
    replace_module(block, units.reader, _linear(reader.weight[:, chosen], reader.bias))
    owner: Any = block.get_submodule(units.owner)
    if len(units.columns[0]) > 1:
        for key in COUNTS:
            if type(getattr(owner, key, None)) is int:
                setattr(owner, key, getattr(owner, key) * len(kept) // units.count)


def write_config(model: Any, **values: int) -> bool:
    """Put sizes into the model's config if it then builds a model of just these shapes; returns whether it does."""
    if any(not hasattr(model.config, key) for key in values):
        return False
    config = copy.deepcopy(model.config)
    for key, value in values.items():
        setattr(config, key, value)
    try:
        config = type(config)(**config.to_dict())
        with torch.device("meta"):
            twin = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, StrictDataclassError):  # sizes that this architecture, or its config, does not divide into
        return False
    same = {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    if same:
        for key, value in values.items():
            setattr(model.config, key, value)
    return same


def _find(block: nn.Module, known: Any, what: str) -> tuple[str, tuple[str, ...], str]:
    """The one module of a block with matrices of such names."""
    found = []
    for owner, module in block.named_modules():
        children = {name for name, child in module.named_children() if is_matrix(child)}
        found += [(owner, w, reader) for w, reader in known if children >= {*w, reader}]
    kind = type(block).__name__
    if not found and what == "feedforward" and any(isinstance(module, ExpertList) for module in block.modules()):
        raise UnfitError(f"a {kind}'s feedforward is experts, of which each token takes some")
    if len(found) != 1:
        count = f"{len(found)} {what}s" if found else f"no {what}"
        raise UnfitError(f"a {kind} has {count} of plain matrices by names that are known; it takes one")
    return found[0]


def _units(owner: str, rows: dict[str, Tensor], reader: str, columns: Tensor) -> Units:
    prefix = f"{owner}." if owner else ""
    return Units(owner, {prefix + name: places for name, places in rows.items()}, prefix + reader, columns)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new
