"""Further layers than the golden one, of other seeds and shapes, whose errors come from published code run on them."""

import numpy as np
import torch
from torch import Tensor, nn

LAYERS = {1: (48, 96, 512), 2: (128, 384, 1536), 3: (64, 320, 160)}
"""Rows, columns and tokens by seed; the third has fewer tokens than columns."""
DEAD = {2: (5, 300)}
"""Inputs that are always zero."""


def calibrated_layer(seed: int) -> tuple[nn.Linear, Tensor]:
    """The matrix (rows, columns) and its inputs (tokens, columns), some of whose channels are much larger."""
    rows, columns, tokens = LAYERS[seed]
    random = np.random.RandomState(seed)
    weight = random.standard_normal((rows, columns)) * 0.05
    mixing = random.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = random.standard_normal((tokens, columns))
    scale = np.exp(0.8 * random.standard_normal(columns))
    scale[: columns // 50 + 1] *= 20
    inputs = (inputs @ (0.6 * np.eye(columns) + 0.8 * mixing)) * scale
    inputs[:, list(DEAD.get(seed, ()))] = 0
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)
    return linear, torch.from_numpy(inputs).float()


def relative_error(weight: Tensor, stored: Tensor, inputs: Tensor) -> float:
    """The squared error of the outputs, relative to the outputs squared, in float64."""
    weight, stored, inputs = weight.double(), stored.double(), inputs.double()
    return float((inputs @ (weight - stored).T).square().sum() / (inputs @ weight.T).square().sum())


def computed(module: nn.Module, columns: int) -> Tensor:
    """The weight (rows, columns) that a module computes with, read off its outputs."""
    with torch.no_grad():
        found: Tensor = module(torch.eye(columns)).T
    return found
