"""The door through which tokens enter a model and its cache, and plain decoding: one token for each pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass
class Generation:
    """What a decoding policy gives back.

    `ids` (batch, prompt + new) are all tokens, stop tokens included; a text that ended early is padded with its
    stop token. `passes` counts passes over the target model after the prompt. `proposed` and `accepted` count
    drafted tokens; both are 0 where nothing is drafted.
    """

    ids: Tensor
    passes: int
    proposed: int = 0
    accepted: int = 0


class MaskedCache(Cache):
    """A cache that says itself which keys a query sees, since a model takes all that it is given for its past.

    `tokens_at_once` is how many tokens one pass may feed, so that what a long prompt needs stays bounded.
    """

    tokens_at_once: int

    def mask(self, tokens: int, device: torch.device) -> Tensor | dict[str, Tensor] | None:
        """What goes in as `attention_mask` with the next `tokens` tokens: (1, 1, tokens, keys), one for each type
        of layer where a model has several; `None` where the model's own causal mask is right."""
        raise NotImplementedError


def forward(model: nn.Module, ids: Tensor, cache: Cache, start: int, *, last: bool = False) -> Tensor:
    """Logits (batch, tokens, vocabulary) of `ids` (batch, tokens), the first of which stands at place `start`.

    With `last` only those of the last token, (batch, 1, vocabulary). Positions are passed explicitly, since an
    evicting cache no longer knows them.
    """
    if not isinstance(cache, MaskedCache):
        return _pass(model, ids, cache, start, None, last)
    pieces, step = [], cache.tokens_at_once
    for begin in range(0, ids.shape[1], step):
        piece = ids[:, begin : begin + step]
        mask = cache.mask(piece.shape[1], ids.device)
        pieces.append(_pass(model, piece, cache, start + begin, mask, last))
    return pieces[-1] if last or len(pieces) == 1 else torch.cat(pieces, 1)


def _pass(
    model: nn.Module, ids: Tensor, cache: Cache, start: int, mask: Tensor | dict[str, Tensor] | None, last: bool
) -> Tensor:
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    more: dict[str, Any] = {cache_argument(model): cache}
    if mask is not None:
        more["attention_mask"] = mask
    if last and ids.shape[1] > 1 and takes(model, "logits_to_keep"):
        # A prompt's other logits are never looked at, and over a large vocabulary they outweigh the model.
        more["logits_to_keep"] = 1
    output = model(input_ids=ids, position_ids=positions, use_cache=True, **more)
    logits: Tensor = output.logits
    return logits[:, -1:] if last else logits


def cache_argument(model: nn.Module) -> str:
    """What a model calls the cache that it is given: transformers 5.24 renamed it, and warns of the old name."""
    return "cache" if takes(model, "cache") else "past_key_values"


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward has an argument of this name. Asked for every token, so a class is looked at once."""
    function = getattr(model.forward, "__func__", None)
    # what was put in a method's place may hold the model, and is not to be kept
    return argument in (_arguments(function) if function else inspect.signature(model.forward).parameters)


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """The distribution that is sampled from, in float32; a point mass on the best token at temperature 0."""
    logits = logits.float()
    if temperature == 0.0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.softmax(logits / temperature, -1)


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token (batch, 1) from logits (batch, vocabulary)."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities(logits, temperature), 1, generator=generator)


@torch.inference_mode()
def plain_decode(
    model: nn.Module,
    cache: Cache,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Generation:
    """Continue `ids` (batch, tokens) through `cache`, which must be empty, token by token."""
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    ends = torch.tensor(list(stop), device=ids.device, dtype=ids.dtype)
    ended = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    pieces, length = [ids], ids.shape[1]
    logits = forward(model, ids, cache, 0, last=True)[:, -1]
    passes = 0
    for step in range(max_new_tokens):
        token = draw(logits, temperature, generator)
        if stop:
            token = torch.where(ended, pieces[-1][:, -1:], token)
            ended = ended | torch.isin(token, ends)
        pieces.append(token)
        if step + 1 == max_new_tokens or (stop and bool(ended.all())):
            break
        logits = forward(model, token, cache, length)[:, -1]
        length += 1
        passes += 1
    return Generation(torch.cat(pieces, 1), passes)
