"""The golden layer: one weight matrix and its inputs, from a fixed seed, with errors known from published code.

The values come from running the papers' released code on this very case, or from closed forms; they are written as
strings, so that the number of digits known is known too.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn


@cache
def _case() -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(0)
    weight = random.standard_normal((64, 256)) * 0.05
    mixing = random.standard_normal((256, 256)) / 16
    inputs = random.standard_normal((2048, 256))
    scale = np.exp(0.8 * random.standard_normal(256))
    scale[[3, 77, 200]] *= 20
    inputs = (inputs @ (0.6 * np.eye(256) + 0.8 * mixing)) * scale
    return torch.from_numpy(weight).float(), torch.from_numpy(inputs).float()


def golden_linear() -> nn.Linear:
    """The matrix (64, 256), a fresh copy."""
    linear = nn.Linear(256, 64, bias=False)
    linear.weight = nn.Parameter(_case()[0].clone(), requires_grad=False)
    return linear


def golden_inputs() -> Tensor:
    """Its inputs (2048, 256): three channels are twenty times the others."""
    return _case()[1].clone()


def output_error(module: nn.Module) -> float:
    """The squared error of the outputs, relative to the outputs squared, in float64."""
    weight, inputs = (tensor.double() for tensor in _case())
    with torch.no_grad():
        stored = module(torch.eye(256)).T.double()
    return float((inputs @ (weight - stored).T).square().sum() / (inputs @ weight.T).square().sum())


def agrees(error: float, golden: str, relative: float = 1e-5) -> bool:
    """Whether `error` is the golden value, up to `relative` and the rounding of its last digit."""
    mantissa, _, exponent = golden.partition("e")
    digits = len(mantissa.partition(".")[2])
    half_unit = 0.5 * 10.0 ** (int(exponent or 0) - digits)
    return abs(error - float(golden)) <= relative * float(golden) + half_unit
