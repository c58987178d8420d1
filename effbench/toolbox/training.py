"""The one training loop: AdamW on float32 weights, the same steps for the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from effbench.errors import UnfitError
from effbench.toolbox.checks import within

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (batch, tokens, vocabulary) and token ids (batch, tokens) to a scalar."""


@dataclass(frozen=True)
class Recipe:
    """How to train: the rate rises over the first share `warm_up` of the steps, then falls to zero in a line.

    `clip` bounds the norm of the whole gradient; `weight_decay` is AdamW's, and applies to matrices only.
    """

    steps: int
    lr: float
    warm_up: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        within("steps", self.steps, 0)
        within("lr", self.lr, 0, open_ends=True)
        within("warm_up", self.warm_up, 0, 1)
        within("weight_decay", self.weight_decay, 0)
        within("clip", self.clip, 0, open_ends=True)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warm_up * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (self.steps - step) / max(1, self.steps - rising)


def check_training(steps: int, batch_size: int, length: int, lr: float, *, fewest_steps: int = 1) -> None:
    """Raises `ValueError` for options of a technique with which nothing can be trained."""
    within("steps", steps, fewest_steps)
    within("batch_size", batch_size, 1)
    within("length", length, 2)
    within("lr", lr, 0, open_ends=True)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it, in nats, averaged over batch and tokens."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: Any,
    batches: Iterable[Tensor],
    loss: Loss,
    recipe: Recipe,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place on batches of token ids (batch, tokens); returns the loss of each step.

    `parameters` are those to be trained, all of the model's unless given. While it trains they are float32; a
    model in half precision computes under bfloat16 autocast. Dropout stays off: a few steps from a checkpoint
    need no regularization, and so nothing is drawn at random here. Afterwards every parameter has the dtype and
    `requires_grad` that it had, the model is in eval mode, and neither gradients nor optimizer are left.
    `progress` is told the step, counted from 0, and its loss.

    Raises `UnfitError` where the loss stops being finite, `ValueError` where there are fewer batches than steps.
    """
    trained = list(model.parameters()) if parameters is None else list(parameters)
    losses: list[float] = []
    model.eval()
    with _trainable(model, trained) as autocast, _fast_attention(model), torch.enable_grad():
        matrices = [weight for weight in trained if weight.ndim > 1]
        others = [weight for weight in trained if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        device = trained[0].device
        for step, ids in zip(range(recipe.steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            ids = ids.to(device)
            with autocast:
                logits = model(input_ids=ids, use_cache=False).logits
            value = loss(logits, ids)
            value.backward()
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value.detach()))
            if not torch.isfinite(value):
                raise UnfitError(f"training diverged: the loss is {losses[-1]} at step {step + 1}; lower lr")
            if progress is not None:
                progress(step, losses[-1])
    if len(losses) < recipe.steps:
        raise ValueError(f"batches must be at least as many as steps, {recipe.steps}, got {len(losses)}")
    return losses


@contextmanager
def _trainable(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[Any]:
    """Float32 throughout and gradients for `trained` alone; the context that steps compute in is yielded."""
    weights = list(model.parameters())
    before = [(weight, weight.dtype, weight.requires_grad) for weight in weights]
    half = weights[0].dtype in (torch.bfloat16, torch.float16)
    chosen = {id(weight) for weight in trained}
    try:
        for weight in weights:
            # what is not trained goes along: outside autocast's operators, dtypes must not be mixed
            weight.data = weight.data.float()
            weight.requires_grad_(id(weight) in chosen)
        yield torch.autocast(weights[0].device.type, torch.bfloat16) if half else nullcontext()
    finally:
        for weight, dtype, requires_grad in before:
            weight.grad = None
            weight.data = weight.data.to(dtype)
            weight.requires_grad_(requires_grad)


@contextmanager
def _fast_attention(model: Any) -> Iterator[None]:
    """Plain attention on a CPU, whose fused kernel is slow at going backward over short texts."""
    used = getattr(model.config, "_attn_implementation", None)
    change = used == "sdpa" and model.device.type == "cpu"
    if change:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if change:
            model.set_attn_implementation(used)
