"""Linear layers of LLM.int8, by the operators of bitsandbytes.

Bits stored for each weight of an m x n matrix (closed form, biases left out): 8 + 32 / n, its row scales are float32.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from effbench.toolbox.bitsandbytes import library
from effbench.toolbox.stored import StoredModule


class LLMInt8Linear(StoredModule):
    """A linear layer over int8 codes with a float32 scale a row; inputs are rounded to int8 row by row.

    threshold: input columns with a number this large stay unrounded, and meet unpacked weights; 0 for none.
    bias, dtype: whether there is a bias, and its type.

    Gradients go to the inputs as if neither had been rounded again.
    """

    def __init__(
        self, in_features: int, out_features: int, threshold: float = 6.0, bias: bool = False, dtype: str = "float32"
    ) -> None:
        super().__init__(
            in_features=in_features, out_features=out_features, threshold=threshold, bias=bias, dtype=dtype
        )
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.codes: Tensor = nn.Buffer(torch.empty(out_features, in_features, dtype=torch.int8))
        self.scales: Tensor = nn.Buffer(torch.empty(out_features, dtype=torch.float32))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(cls, linear: nn.Linear, threshold: float) -> Self:
        """The module that rounds the weights of `linear`."""
        bias = linear.bias
        dtype = str(bias.dtype if bias is not None else torch.float32).removeprefix("torch.")
        module = cls(linear.in_features, linear.out_features, threshold, bias is not None, dtype)
        weight = linear.weight.detach().contiguous()
        weight = weight.half() if weight.is_cuda else weight.float()  # all that the library rounds there
        module.codes, module.scales, _ = library().int8_vectorwise_quant(weight)
        if bias is not None:
            module.bias = bias.detach().clone()
        return module

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix (out, in) that the codes stand for, made anew by each call."""
        return (self.codes.float() * (self.scales / 127).unsqueeze(1)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        product = self._product(rows.detach()) if rows.shape[0] else rows.new_empty(0, self.out_features)
        if torch.is_grad_enabled() and x.requires_grad:
            plain = nn.functional.linear(rows, self.dequantized(x.dtype))
            product = plain + (product - plain).detach()
        return product.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        functional = library()
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        # a copy: large numbers are taken out of the rows in place and put back afterwards
        copied = rows.to(torch.float16 if rows.is_cuda else torch.float32, copy=True)
        codes, scales, large = functional.int8_vectorwise_quant(copied, threshold=self.threshold)
        product: Tensor
        if large is not None:
            product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                rows, codes, self.codes, scales, self.scales, large, bias
            )
        else:
            product = torch.ops.bitsandbytes.int8_scaled_mm.default(
                codes, self.codes, scales, self.scales, bias=bias, dtype=rows.dtype
            )
        return product
