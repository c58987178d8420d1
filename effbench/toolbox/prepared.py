"""Linear layers that first put their inputs in another order or scale, where nothing before them can do it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.toolbox.stored import StoredModule


class _PreparedLinear(StoredModule):
    """A linear layer `inner` (out, in) behind a step that takes each row of inputs to another of the same width."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options: Any) -> None:
        super().__init__(in_features=in_features, out_features=out_features, bias=bias, **options)
        self.in_features, self.out_features = in_features, out_features
        self.inner: nn.Module = nn.Linear(in_features, out_features, bias=bias)

    @classmethod
    def _around(cls, inner: Any, **options: Any) -> Self:
        with torch.device("meta"):
            module = cls(inner.in_features, inner.out_features, getattr(inner, "bias", None) is not None, **options)
        module.inner = inner
        return module


class ReorderedLinear(_PreparedLinear):
    """Input i of `inner` is input `order[i]`; the order takes 32 bits an input."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.order: Tensor = nn.Buffer(torch.empty(in_features, dtype=torch.int32))

    @classmethod
    def of(cls, inner: nn.Module, order: Tensor) -> Self:
        """The layer that computes `inner(x[..., order])`; `inner` tells its in_features and out_features."""
        module = cls._around(inner)
        module.order = order.to(torch.int32)
        return module

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.inner(x.index_select(-1, self.order))
        return product


class ScaledLinear(_PreparedLinear):
    """Input i of `inner` is input i divided by `scales[i]`; a scale takes 16 bits, or 32 with `scale_dtype` float32."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, scale_dtype: str = "float16") -> None:
        super().__init__(in_features, out_features, bias, scale_dtype=scale_dtype)
        self.scales: Tensor = nn.Buffer(torch.empty(in_features, dtype=getattr(torch, scale_dtype)))

    @classmethod
    def of(cls, inner: nn.Module, scales: Tensor) -> Self:
        """The layer that computes `inner(x / scales)`, where `scales` (in,) are float16 or float32."""
        module = cls._around(inner, scale_dtype=str(scales.dtype).removeprefix("torch."))
        module.scales = scales
        return module

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.inner((x.float() / self.scales.float()).to(x.dtype))
        return product
