"""LLM-Pruner: whole attention heads and feedforward channels are removed, by what the loss would lose to first order.

What depends on each other goes together: a head's rows of the query, key and value matrices with its columns of the
output matrix (all query heads that share a key head are one group), a channel's rows with its column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.errors import UnfitError
from effbench.technique import Data, System, Technique
from effbench.toolbox.architectures import FEEDFORWARD_SIZES, has_slopes
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.fisher import gradients
from effbench.toolbox.structure import Units, channels, heads, keep_units, write_config
from effbench.toolbox.training import next_token_loss
from effbench.toolbox.walk import blocks, matrices

Scores = dict[nn.Module, tuple[Tensor, Tensor]]
"""For each matrix the importance of its rows (out,) and of its columns (in,)."""


@dataclass(frozen=True)
class LLMPruner(Technique):
    """Remove the heads and channels of each block whose weights times their gradients are smallest.

    sparsity: share of the weights in the blocks that are removed, the same in each block that is pruned; heads go
        whole, and channels make up for the rest.
    importance: "param_first" sums |weight x gradient| over a group; "vector" adds up weight x gradient within each
        row or column before the absolute value.
    skip_first, skip_last: shares of the blocks at either end that are left whole, rounded down to whole blocks.
    samples, length: sequences of calibration text, and tokens in each.
    """

    paper: ClassVar[str] = "Ma et al. 2023, arXiv:2305.11627"

    sparsity: float = 0.2
    importance: str = "param_first"
    skip_first: float = 0.125
    skip_last: float = 0.0625
    samples: int = 10
    length: int = 64

    def __post_init__(self) -> None:
        within("sparsity", self.sparsity, 0, 1)
        one_of("importance", self.importance, ("param_first", "vector"))
        within("skip_first", self.skip_first, 0, 1)
        within("skip_last", self.skip_last, 0, 1)
        within("samples", self.samples, 1)
        within("length", self.length, 2)

    def unfit(self, system: System) -> str | None:
        if not matrices(system.model):
            return "no plain weight matrix is left to compress: put this technique before the one that packs them"
        if has_slopes(system.config):
            return "each head's number gives it a slope (ALiBi), and to remove some would give the others new ones"
        layers = blocks(system.model)[1]
        try:
            for block in self._pruned(layers):
                heads(block), channels(block)
        except UnfitError as reason:
            return str(reason)
        if not self._pruned(layers):
            return f"skip_first={self.skip_first:g} and skip_last={self.skip_last:g} leave no block to prune"
        if self._share(layers) >= 1:
            return f"sparsity={self.sparsity:g} is more than the blocks between skip_first and skip_last hold"
        return None

    def _pruned(self, layers: nn.ModuleList) -> list[nn.Module]:
        depth = len(layers)
        return list(layers)[int(self.skip_first * depth) : depth - int(self.skip_last * depth)]

    def _share(self, layers: nn.ModuleList) -> float:
        """The share of each pruned block's weights that goes, so that `sparsity` of all blocks' does."""
        return self.sparsity * len(layers) / len(self._pruned(layers))

    def apply(self, system: System, data: Data) -> System:
        model, layers = system.model, blocks(system.model)[1]
        ids = data.calibration(self.samples, min(self.length, system.context))
        scores = taylor(model, ids, vector=self.importance == "vector")
        share = self._share(layers)
        with torch.no_grad():
            for block in self._pruned(layers):
                prune(block, scores, share)
        del scores
        write_sizes(model)
        return system


def taylor(model: Any, ids: Tensor, *, vector: bool = False) -> Scores:
    """First-order importance of rows and columns of all matrices in the blocks, for the loss on `ids`, in one pass.

    Each gradient is dropped as soon as it is summed up, so beside the model the peak is one of them and the
    activations of all sequences.
    """
    scores: Scores = {}
    layers = blocks(model)[1]
    wanted = [module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)]
    ids = ids.to(model.device)
    with gradients(model, {module: _scoring(module, scores, vector) for module in wanted}):
        next_token_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
    return scores


def _scoring(module: Any, scores: Scores, vector: bool) -> Callable[[Tensor], None]:
    def score(weight: Tensor) -> None:
        assert weight.grad is not None
        product = weight.detach().float() * weight.grad.float()
        product = product.T if isinstance(module, Conv1D) else product
        if vector:
            scores[module] = product.sum(1).abs(), product.sum(0).abs()
        else:
            scores[module] = product.abs().sum(1), product.abs().sum(0)
        weight.grad = None

    return score


def prune(block: nn.Module, scores: Scores, share: float) -> None:
    """Remove so large a share of a block's weights: whole heads, then as many channels as come nearest to it.

    One head group and one channel always stay.
    """
    by_head, by_channel = heads(block), channels(block)
    one_head, one_channel = by_head.weights(block), by_channel.weights(block)
    wanted = share * (one_head * by_head.count + one_channel * by_channel.count)
    few_heads = min(int(share * by_head.count + 0.5), by_head.count - 1)
    few_channels = round((wanted - few_heads * one_head) / one_channel)
    few_channels = max(0, min(few_channels, by_channel.count - 1))
    kept = [
        (units, importance(block, units, scores).argsort(stable=True)[few:].sort().values)
        for units, few in ((by_head, few_heads), (by_channel, few_channels))
    ]
    for units, places in kept:
        keep_units(block, units, places)


def importance(block: nn.Module, units: Units, scores: Scores) -> Tensor:
    """What the loss would lose without each unit, (units,): its rows' and columns' importance added up."""
    total = scores[block.get_submodule(units.reader)][1].cpu()[units.columns].sum(1)
    for name, rows in units.rows.items():
        total = total + scores[block.get_submodule(name)][0].cpu()[rows].sum(1)
    return total


def write_sizes(model: Any) -> None:
    """Put the blocks' sizes into the config, where it can hold them: all blocks are alike and heads have a size."""
    layers, config = blocks(model)[1], model.config
    sizes = {(heads(block).count, heads(block).columns.shape[1], channels(block).count) for block in layers}
    if len(sizes) > 1:
        return
    groups, width, inner = sizes.pop()
    values = {key: inner for key in FEEDFORWARD_SIZES if hasattr(config, key)}
    if "head_dim" in config.to_dict():  # and not worked out from the stream's width
        values |= {"num_attention_heads": groups * width // config.head_dim, "head_dim": config.head_dim}
        if hasattr(config, "num_key_value_heads"):
            values["num_key_value_heads"] = groups
    write_config(model, **values)
