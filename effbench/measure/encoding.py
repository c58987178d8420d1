"""From lm-eval's requests to token ids: every different text is tokenized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from effbench.errors import TaskError


@dataclass(frozen=True)
class Choices:
    """Choices and the contexts that they follow, as token ids.

    contexts: each different one once. context_of (choices,): the place of a choice's context. tokens: those of all
    choices, one behind the other. lengths (choices,): how many are whose.
    """

    contexts: list[np.ndarray]
    context_of: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Choices:
        """From the token ids of each context and its choice."""
        places: dict[tuple[int, ...], int] = {}
        context_of = np.empty(len(pairs), np.int64)
        last: Sequence[int] | None = None
        for number, (context, _) in enumerate(pairs):
            if context is last:
                context_of[number] = context_of[number - 1]
            else:
                context_of[number] = places.setdefault(tuple(context), len(places))
            last = context
        tokens = [token for _, choice in pairs for token in choice]
        lengths = np.array([len(choice) for _, choice in pairs], np.int64)
        return cls([np.array(ids, np.int64) for ids in places], context_of, np.array(tokens, np.int64), lengths)

    @classmethod
    def joined(cls, parts: Sequence[Choices]) -> Choices:
        """Those of all parts, in their order."""
        before = np.cumsum([0, *(len(part.contexts) for part in parts)])
        return cls(
            [context for part in parts for context in part.contexts],
            np.concatenate([part.context_of + skipped for part, skipped in zip(parts, before, strict=False)]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )

    def some(self, places: Sequence[int]) -> Choices:
        """The choices at these places, and the contexts that they need."""
        needed, context_of = np.unique(self.context_of[list(places)], return_inverse=True)
        starts, lengths = self.starts[list(places)], self.lengths[list(places)]
        tokens = [self.tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return Choices([self.contexts[one] for one in needed], context_of, np.concatenate(tokens), lengths)

    @property
    def starts(self) -> np.ndarray:
        """Where the tokens of each choice begin."""
        return np.asarray(self.lengths.cumsum() - self.lengths, np.int64)


class Encoder(TemplateLM):
    """lm-eval's way from texts to token ids, with each different text tokenized once."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._start: str = tokenizer.bos_token or ""
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that starts it, if there is one."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """Fingerprints lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns of a chat as the tokenizer's template writes them; without a system turn where it knows none.

        Raises `TaskError` where the tokenizer has no template.
        """
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise TaskError(
                "the model's tokenizer has no chat template (--apply-chat-template); leave that out, or give a model "
                "that was made for chats"
            )
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(turns, **options))

    def encode(self, requests: Sequence[Any]) -> Choices:
        """The contexts and choices of log-likelihood requests.

        Texts are tokenized in one call, since one by one would take longer than the model; and a choice without its
        context where that makes no difference.
        """
        pairs = {request.args for request in requests}
        contexts = {context for context, _ in pairs}
        apart = (
            {c for c in contexts if c and not self._starts_itself(c)} if _splits_at_spaces(self.tokenizer) else set()
        )
        tails = {pair for pair in pairs if pair[0] in apart and pair[1].startswith(" ")}
        texts = contexts | {context.rstrip() for context in contexts} | {c + choice for c, choice in pairs - tails}
        listed = sorted(text for text in texts if not self._starts_itself(text))
        self._encoded = self._tokenized(listed)
        behind = self._tokenized(sorted({choice for _, choice in tails}), add_special_tokens=False)
        self._encoded |= {context + choice: self._encoded[context] + behind[choice] for context, choice in tails}
        found = super().loglikelihood(list(requests), disable_tqdm=True)
        self._encoded = {}
        return Choices.of(found)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The token ids of a context and of what follows it.

        Where tokens reach across the end of the context, what follows may get none of its own by lm-eval's count,
        which then stops. Here it gets those from the first one on that is not the context's.
        """
        before, behind = super()._encode_pair(context, continuation)
        if behind:
            return before, behind
        whole = self.tok_encode(context + continuation)
        shared = next((place for place, (one, two) in enumerate(zip(before, whole, strict=False)) if one != two), None)
        cut = len(whole) - 1 if shared is None else shared
        return whole[:cut] or [self.prefix_token_id], whole[cut:]

    def _tokenized(self, texts: list[str], **options: Any) -> dict[str, list[int]]:
        ids = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"] if texts else []
        return dict(zip(texts, ids, strict=True))

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Any]:
        """Where lm-eval hands over what it encoded: it is what `encode` wants."""
        return [(context, choice) for _, context, choice in requests]

    def _starts_itself(self, text: str) -> bool:
        """Whether a text brings its own start token."""
        return bool(self._start) and text.startswith(self._start)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as the tokenizer makes them; no second start token where the text brings its own."""
        if add_special_tokens is None and string in self._encoded:
            return self._encoded[string]
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self._starts_itself(string):
            options["add_special_tokens"] = False
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a text's tokens are those of its words, behind what every text starts with.

    Then the tokens of a context and " a choice" are those of the context followed by those of the choice.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.pre_tokenizer).__name__ != "WhitespaceSplit" or backend.normalizer is not None:
        return False
    if any(character.isspace() for token in backend.get_added_tokens_decoder().values() for character in token.content):
        return False
    word = next(iter(backend.get_vocab(with_added_tokens=False)), "")
    empty, alone = tokenizer.encode(""), tokenizer.encode(word, add_special_tokens=False)
    return bool(tokenizer.encode(word) == empty + alone)
