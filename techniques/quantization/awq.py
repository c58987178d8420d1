"""AWQ: scale up the inputs that matter, so that rounding to nearest hurts them less, and clip what is rarely used.

Scales are folded into the norm or matrix before, found by trial and also where attention heads share values. Where
nothing can take them (behind GELU, or a norm that others read too), they divide the inputs at run time and are stored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.folding import Fold, find_folds, find_products, fold
from effbench.toolbox.grid import decode, encode, fit_grid
from effbench.toolbox.packed import misfit
from effbench.toolbox.packing import Packing
from effbench.toolbox.prepared import ScaledLinear
from effbench.toolbox.walk import Block, as_linear, walk

STEPS = 20
"""Powers of the mean activation that are tried as scales: 0, which is plain rounding, to 0.95."""
SMALLEST_SCALE = 1e-4
CLIPS = [1 - step / 20 for step in range(10)]
"""Shares of a group's largest weight that are tried as its limit."""


@dataclass(frozen=True)
class AWQ(LayerTechnique):
    """Round to nearest after scaling each input by a power of its mean activation, the one that changes outputs least.

    bits: of a code: 8, 4, 3 or 2.
    group_size: how many inputs of a row share a grid; 0 for the whole row.
    symmetric: grids reach as far below zero as above and store no zero point.
    clip: also cut each group's largest weights where this changes outputs less; not for queries and keys.
    samples: sequences of calibration text, each as long as the model's context, at most 512 tokens.
    scale_dtype: "float16", or "float32" for comparing with published code. Where the int4 kernel computes, scales
        and zero points are the bfloat16 pairs that it reads.
    """

    paper: ClassVar[str] = "Lin et al. 2024, arXiv:2306.00978"
    dense_inputs: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 0
    symmetric: bool = False
    clip: bool = True
    samples: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (8, 4, 3, 2))
        within("group_size", self.group_size, 0)
        within("samples", self.samples, 1)
        one_of("scale_dtype", self.scale_dtype, ("float16", "float32"))

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return misfit(linear, self.group_size)

    def calibration_size(self, system: System) -> dict[str, int]:
        return {"samples": self.samples, "length": min(system.context, 512)}

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        """One matrix by itself: its scales divide the inputs at run time, since there is nothing to fold them into."""
        inputs = Inputs.of(inputs)
        scales = self._storable(self._search(inputs.mean_abs, self._matrix_loss(linear, inputs.gram)))
        scaled = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        scaled.weight = nn.Parameter(linear.weight.detach().float() * scales, requires_grad=False)
        scaled.bias = linear.bias
        return self._packed(linear, inputs, scaled=scaled, scales=scales, folded=False, clip=self.clip)

    @torch.no_grad()
    def apply(self, system: System, data: Data) -> System:
        heads = int(getattr(system.config, "num_attention_heads", 1))
        for block in walk(system.model, data.calibration(**self.calibration_size(system))):
            self._compress(block, heads)
        return system

    def _compress(self, block: Block, heads: int) -> None:
        """Search all scales on the dense block, then fold them, clip and round."""
        names = block.matrices()
        groups = [tuple(group) for group in block.groups(names)]
        folds = {place.readers: place for place in find_folds(block, heads)}
        unclipped = find_products(block) | {place.source for place in folds.values() if _gives_more(block, place)}
        inputs = block.inputs(names, ("gram", "mean_abs", "spread"))
        # a matrix that was never called (an idle expert) stays as it is: nothing is known about its inputs
        scales = {
            group: self._group_scales(block, group, inputs[group[0]], folds.get(group))
            for group in groups
            if group[0] in inputs
        }
        block.advance()
        scaling = fold(block, [(folds[group], found) for group, found in scales.items() if group in folds])
        for group, found in scales.items():
            for name in group:
                columns = scaling.columns.setdefault(name, found)
                layer = partial(
                    self._packed,
                    scaled=scaling.linear(block, name),
                    scales=columns,
                    folded=group in folds,
                    clip=self.clip and name not in unclipped,
                )
                block.replace(name, layer, inputs[name])

    def _group_scales(self, block: Block, group: tuple[str, ...], inputs: Inputs, place: Fold | None) -> Tensor:
        """The scales (in,) of matrices that are fed the same."""
        linears = [as_linear(block.module.get_submodule(name)) for name in group]
        part = _Part(block, group, place)
        alone = part.name == group[0]
        if not alone:  # of one part at a time, since its inputs are as many as the hidden states
            part.note(block)
        loss = self._matrix_loss(linears[0], inputs.gram) if alone else self._part_loss(linears, part)
        scales = self._search(place.mean(inputs.mean_abs) if place else inputs.mean_abs, loss)
        return scales if place else self._storable(scales)

    def _search(self, mean: Tensor, loss: Callable[[Tensor], float]) -> Tensor:
        """Of the powers of the mean activation (in,) the one with the least loss as scales."""
        best, least = torch.ones_like(mean), float("inf")
        for step in range(STEPS):
            scales = mean.pow(step / STEPS).clamp(min=SMALLEST_SCALE)
            scales = scales / (scales.max() * scales.min()).sqrt()
            found = loss(scales)
            if found < least:
                best, least = scales, found
        return best

    def _matrix_loss(self, linear: nn.Linear, gram: Tensor) -> Callable[[Tensor], float]:
        """The squared error of a matrix's outputs for given scales, from the `gram` (in, in) of its inputs."""
        weight = linear.weight.detach().float()

        def loss(scales: Tensor) -> float:
            error = self._rounded(weight * scales) / scales - weight
            return float(((error @ gram) * error).sum())

        return loss

    def _part_loss(self, linears: list[nn.Linear], part: "_Part") -> Callable[[Tensor], float]:
        """The squared error of a part's outputs for given scales of the inputs that `linears` share."""
        dense = [linear.weight.detach().clone() for linear in linears]
        expected = list(part.outputs())

        def loss(scales: Tensor) -> float:
            for linear, weight in zip(linears, dense, strict=True):
                rounded = self._rounded(weight.float() * scales) / scales
                linear.weight.data.copy_(rounded)
            found = zip(part.outputs(), expected, strict=True)
            total = sum(float((output.float() - right.float()).square().sum()) for output, right in found)
            for linear, weight in zip(linears, dense, strict=True):
                linear.weight.data.copy_(weight)
            return total

        return loss

    def _rounded(self, weight: Tensor) -> Tensor:
        """What a weight (out, in) would stand for after rounding, in float32."""
        groups = weight.unflatten(1, (-1, self.group_size or weight.shape[1]))
        return self._levels(groups, getattr(torch, self.scale_dtype)).flatten(1)

    def _levels(self, groups: Tensor, dtype: torch.dtype) -> Tensor:
        scales, zeros = fit_grid(groups, self.bits, symmetric=self.symmetric, dtype=dtype)
        return decode(encode(groups, scales, zeros, self.bits), scales, zeros)

    def _storable(self, scales: Tensor) -> Tensor:
        """Scales (in,) as they will be stored."""
        return scales.to(getattr(torch, self.scale_dtype)).float()

    def _packed(
        self,
        linear: nn.Linear,
        inputs: Inputs | Tensor | None,
        *,
        scaled: nn.Linear,
        scales: Tensor,
        folded: bool,
        clip: bool,
    ) -> nn.Module:
        """The module in the place of `linear`, whose scaled weight is that of `scaled`."""
        packing = Packing.of(linear, self.bits, self.group_size, self.symmetric, self.scale_dtype)
        groups = packing.groups(scaled.weight)
        if clip:
            groups = self._clipped(groups, Inputs.of(inputs).spread() / scales, packing.dtype)
        packed = packing.rounded(groups, scaled.bias)
        return packed if folded else ScaledLinear.of(packed, scales.to(getattr(torch, self.scale_dtype)))

    def _clipped(self, groups: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """`groups` (out, groups, width), each cut where rounding then changes its share of the outputs least.

        `rows` (tokens, in) are inputs.
        """
        pieces = rows.unflatten(1, groups.shape[1:]).transpose(0, 1)
        gram = pieces.transpose(1, 2) @ pieces
        largest = groups.abs().amax(-1, keepdim=True)
        limits, least = largest, torch.full_like(largest, float("inf"))
        for share in CLIPS:
            limit = largest * share
            error = (self._levels(groups.clamp(-limit, limit), dtype) - groups).transpose(0, 1)
            found = ((error @ gram) * error).sum(-1).T.unsqueeze(-1)
            limits, least = torch.where(found < least, limit, limits), torch.minimum(found, least)
        return groups.clamp(-limits, limits)


class _Part:
    """The part of a block whose outputs judge the scales of a group: attention, feedforward or the matrix itself."""

    def __init__(self, block: Block, group: tuple[str, ...], place: Fold | None) -> None:
        common = ".".join(commonprefix([name.split(".")[:-1] for name in group]))
        behind_norm = place is not None and place.rows is None
        self.name = common if len(group) > 1 or (behind_norm and common) else group[0]
        self._module = block.module.get_submodule(self.name)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(self, block: Block) -> None:
        """Take down all that it is called with."""
        hook = self._module.register_forward_pre_hook(
            lambda _, args, keywords: self._calls.append((args, keywords)), with_kwargs=True
        )
        try:
            for call in range(len(block.hidden)):
                block.run(call)
        finally:
            hook.remove()

    def outputs(self) -> Iterator[Tensor]:
        """What it gives now, for each call."""
        for args, keywords in self._calls:
            output = self._module(*args, **keywords)
            yield output[0] if isinstance(output, tuple) else output


def _gives_more(block: Block, place: Fold) -> bool:
    """Whether only some rows of a source are scaled: the others are queries and keys, or gates."""
    if place.rows is None:
        return False
    return len(place.rows.unique()) < as_linear(block.module.get_submodule(place.source)).out_features
