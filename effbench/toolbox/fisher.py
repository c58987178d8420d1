"""Squared gradients of the loss on text: how much each weight matters, as far as a diagonal can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from effbench.toolbox.walk import matrices


def input_importance(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """For each weight matrix (out, in) in the blocks, by name: the empirical Fisher information of its inputs, (in,).

    It is the square of the gradient of a sequence's log-likelihood, summed over the outputs and over the sequences
    `ids` (sequences, tokens). One sequence is read at a time and each gradient is dropped as soon as it is summed up,
    so that beside the model, the peak is one sequence's activations and one gradient.
    """
    found: dict[str, Tensor] = {}
    wanted = [(model.get_submodule(name), name) for name, _ in matrices(model)]
    with gradients(model, {module: _adding(name, module, found) for module, name in wanted}):
        for sequence in ids.to(model.device):
            logits = model(input_ids=sequence[None], use_cache=False).logits[0]
            functional.cross_entropy(logits[:-1].float(), sequence[1:], reduction="sum").backward()
    return found


@contextmanager
def gradients(model: Any, wanted: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """While it lasts, a backward pass hands each of these modules' weights to its function once the gradient is there.

    The function drops the gradient, so that beside the model there is one at a time. No other parameter has any, and
    all are as before in the end.
    """
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    hooks = []
    try:
        model.requires_grad_(False)
        uses: dict[nn.Parameter, list[Callable[[Tensor], None]]] = {}  # several where modules share a weight
        for module, use in wanted.items():
            weight: Any = module.weight
            uses.setdefault(weight, []).append(use)
        for weight, handed in uses.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(_hand_over, handed)))
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, requires_grad in before:
            weight.grad = None
            weight.requires_grad_(requires_grad)


def _hand_over(uses: list[Callable[[Tensor], None]], weight: Tensor) -> None:
    gradient = weight.grad
    for use in uses:
        weight.grad = gradient
        use(weight)


def _adding(name: str, module: nn.Module, found: dict[str, Tensor]) -> Callable[[Tensor], None]:
    outputs = 1 if isinstance(module, Conv1D) else 0

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        squares = weight.grad.float().square().sum(outputs)
        found[name] = found[name] + squares if name in found else squares
        weight.grad = None

    return add
