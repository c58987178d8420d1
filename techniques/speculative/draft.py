"""Speculative decoding: a small draft model proposes tokens, the model checks them all in one pass.

A proposed token is accepted with probability min(1, p/q) of the model's and the draft's; at the first rejection a
token is drawn from what is left, max(0, p - q). The text that comes out follows the model's own distribution exactly,
whatever the draft; a good draft only makes it come sooner. At temperature 0 it is the model's greedy text, but for
ties: a pass over several tokens may round otherwise than passes over one, so in bfloat16 two tokens may change places
whose logits are as close as it rounds (within 1/64 of the largest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from effbench.errors import UnfitError
from effbench.technique import CachePolicy, Data, DecodingPolicy, Generation, System, Technique
from effbench.toolbox.checks import within
from effbench.toolbox.decoding import draw, forward, probabilities


@dataclass(frozen=True)
class Draft(Technique):
    """Let a draft model propose tokens.

    model: the draft, by the name of an embedded model, a folder or a hub id; it must have the same vocabulary.
    ahead: tokens proposed for each pass over the model.
    """

    paper: ClassVar[str] = "Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318"

    model: str = "ref-70k"
    ahead: int = 4

    def __post_init__(self) -> None:
        within("ahead", self.ahead, 1, 64)

    def unfit(self, system: System) -> str | None:
        if type(system.generate) is not DecodingPolicy:
            return f"a {type(system.generate).__name__} already decides how tokens come out"
        cache = system.new_cache()
        if not cache.is_croppable:
            return f"rejected tokens cannot be taken back out of a {type(cache).__name__} of this model"
        return None

    def apply(self, system: System, data: Data) -> System:
        draft = data.model(self.model)
        if draft.tokenizer.get_vocab() != system.tokenizer.get_vocab():
            raise UnfitError(
                f"the draft {self.model} has another vocabulary ({len(draft.tokenizer):,} tokens, the model has "
                f"{len(system.tokenizer):,}); give model= the name of a smaller model with the same tokenizer"
            )
        if type(draft.new_cache) is not CachePolicy or draft.parts:
            raise UnfitError(f"the draft {self.model} has a cache or parts of its own; give model= a plain one")
        if not draft.new_cache().is_croppable:
            raise UnfitError(f"rejected tokens cannot be taken back out of the draft {self.model}'s cache")
        system.parts["draft"] = draft.model
        system.generate = SpeculativeDecoding(self.ahead)
        return system


@dataclass(frozen=True)
class SpeculativeDecoding(DecodingPolicy):
    """Tokens proposed by `system.parts["draft"]`, up to `ahead` for each pass over the model."""

    ahead: int = 4

    @torch.inference_mode()
    def __call__(
        self,
        system: System,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> Generation:
        """Continue `ids` (1, tokens).

        Raises `UnfitError` for more than one text: each would accept another number of tokens.
        """
        if ids.shape[0] != 1:
            raise UnfitError(f"speculative decoding continues one text at a time, got a batch of {ids.shape[0]}")
        generator = torch.Generator(device=ids.device).manual_seed(seed)
        cache, drafter = system.new_cache(), _Drafter(system.parts["draft"])
        logits = forward(system.model, ids, cache, 0, last=True)
        cache.activate_past_recording()
        text, end, ends = ids[0].tolist(), ids.shape[1] + max_new_tokens, set(stop)
        generation = Generation(ids, passes=0)
        new = draw(logits[:, -1], temperature, generator).tolist()[0]
        while max_new_tokens > 0:
            text += new
            if len(text) >= end or ends.intersection(new):
                break
            ahead = min(self.ahead, end - len(text) - 1, drafter.context - len(text))
            proposed, guesses = drafter.propose(text, max(0, ahead), logits.shape[-1], temperature, generator)
            fed = torch.tensor([[text[-1], *proposed]], device=ids.device)
            logits = forward(system.model, fed, cache, len(text) - 1)
            accepted, token = verify(probabilities(logits, temperature), guesses, fed[:, 1:], generator)
            count = int(accepted)
            cache.crop(count - len(proposed))
            new = [*proposed[:count], int(token)]
            generation.passes += 1
            generation.proposed += len(proposed)
            generation.accepted += count
        stopped = next((place for place in range(ids.shape[1], len(text)) if text[place] in ends), len(text))
        generation.ids = torch.tensor([text[: stopped + 1]], device=ids.device, dtype=ids.dtype)
        return generation


def verify(target: Tensor, draft: Tensor, proposed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How many proposed tokens each row accepts, (batch,), and the token that comes after them, (batch,).

    `target` (batch, ahead + 1, vocabulary) and `draft` (batch, ahead, vocabulary) are probabilities, `proposed`
    (batch, ahead) was drawn from `draft`. Algorithm 1 of arXiv:2211.17192.
    """
    chosen = proposed[..., None]
    p, q = target[:, :-1].gather(-1, chosen)[..., 0], draft.gather(-1, chosen)[..., 0]
    drawn = torch.rand(p.shape, generator=generator, device=p.device)
    accepted = (drawn * q < p).long().cumprod(-1).sum(-1)
    # A row of zeros stands for the place after the last proposal, where nothing was drafted: all of p is left.
    drafted = torch.cat([draft, torch.zeros_like(target[:, :1])], 1)
    row = torch.arange(len(accepted), device=accepted.device)
    wanted = target[row, accepted]
    left = (wanted - drafted[row, accepted]).clamp_min(0)
    # Equal rows reject only by rounding, and leave nothing to draw from.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, wanted)
    return accepted, torch.multinomial(left, 1, generator=generator)[:, 0]


class _Drafter:
    """The draft model with its cache, which may lag behind the text and never holds a rejected token."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._held = 0
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2048)

    def propose(
        self, text: list[int], ahead: int, vocabulary: int, temperature: float, generator: torch.Generator
    ) -> tuple[list[int], Tensor]:
        """`ahead` tokens after `text`, and the distributions (1, ahead, vocabulary) that they were drawn from."""
        device = generator.device
        rows, tokens = [torch.zeros(1, 0, vocabulary, device=device)], []
        self._forget(len(text) - 1)
        if max(text[self._held :]) >= self._model.config.vocab_size:
            return tokens, rows[0]  # from a wider model's padding: the draft cannot read on
        for _ in range(ahead):
            fed = torch.tensor([(text + tokens)[self._held :]], device=device)
            logits = forward(self._model, fed, self._cache, self._held, last=True)
            if self._held == 0:
                self._cache.activate_past_recording()
            self._held += fed.shape[1]
            # The two models may pad the same vocabulary to different widths.
            logits = logits[..., :vocabulary].float()
            logits = nn.functional.pad(logits, (0, vocabulary - logits.shape[-1]), value=-torch.inf)
            rows.append(probabilities(logits, temperature))
            tokens.append(int(torch.multinomial(rows[-1][0, 0], 1, generator=generator)))
        return tokens, torch.cat(rows, 1)

    def _forget(self, places: int) -> None:
        """Roll back to at most `places` tokens; what was rejected lies behind them."""
        if self._held:
            self._cache.crop(min(0, places - self._held))
            self._held = min(self._held, places)
