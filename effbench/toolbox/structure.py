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
from effbench.toolbox.architectures import ATTENTION, FEEDFORWARD, blocks, is_matrix
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


def keep_blocks(model: Any, places: Sequence[int]) -> None:
    """Leave only the blocks at `places`, renumbered so that caches have no gaps, and a config that says so."""
    name, layers = blocks(model)
    depth, kept = len(layers), [layers[place] for place in places]
    replace_module(model, name, nn.ModuleList(kept))
    for place, block in enumerate(kept):
        module: Any
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for key, value in list(vars(model.config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and "layer" in key:
            setattr(model.config, key, [value[place] for place in places])
    model.config.num_hidden_layers = len(kept)


def heads(block: nn.Module) -> Units:
    """The heads of a block; with grouped queries, each key head with its query heads.

    Raises `UnfitError` where attention is of a form in which whole heads are not told apart.
    """
    owner, writers, reader = _find(block, ATTENTION, "attention")
    attention: Any = block.get_submodule(owner)
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
    if len(writers) == 3:
        shared = outputs[1] // size
        fits = outputs[0] == width and outputs[1] == outputs[2] and width % outputs[1] == 0
        rows = {name: torch.arange(linear.out_features).view(shared, -1) for name, linear in linears.items()}
    else:
        shared, fits = width // size, outputs == [3 * width]
        if fits and writers == ("c_attn",):  # all queries, all keys, all values
            rows = {writers[0]: torch.arange(3 * width).view(3, shared, size).transpose(0, 1).reshape(shared, -1)}
        else:  # query, key and value of one head after the other
            rows = {writers[0]: torch.arange(outputs[0]).view(shared, -1)}
    if not fits:
        raise UnfitError("attention's matrices are of sizes in which whole heads are not told apart")
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
    if len(found) != 1:
        count = f"{len(found)} {what}s" if found else f"no {what}"
        raise UnfitError(f"a {type(block).__name__} has {count} of plain matrices by names that are known, not one")
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
