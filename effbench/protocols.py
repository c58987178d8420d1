"""Published conventions of perplexity: the same text, cut, joined and counted as each of them does.

document    ours, and the default (see `effbench.data`): each document alone, all tokens of a window but its first
gptq        GPTQ's released code, as in most papers: rows joined by two newlines into one stream, whole windows of N
            tokens, what is left over dropped; nothing is put before a window
lm-eval     lm-evaluation-harness's task `wikitext`: each page through its detokenizer, rolled over in windows of N
            that follow one token before them; words and bytes are those of the page as it was
llama.cpp   its perplexity tool: one stream, whole windows of N, of which the second half is scored; the start token
            of a tokenizer that has one takes the place of each window's first token

Figures of different protocols are not comparable, and neither are those of different N. WikiText comes in two forms,
its own files and the data set's rows joined by two newlines; either is turned into the one that a protocol reads
(`effbench.streams`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from effbench.errors import TextError, UsageError
from effbench.registry import suggest

if TYPE_CHECKING:
    from effbench.results import Record


WINDOW = 2048
"""The longest window, in tokens, that is scored or trained on, as in the papers' tables; shorter contexts are kept."""


@dataclass(frozen=True)
class Protocol:
    """One convention. `window` is how long its windows are by default, at most: `None` is the model's context."""

    name: str
    window: int | None
    cuts_to_context: bool
    """Whether a model with a shorter context gets shorter windows; otherwise it cannot be scored."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("document", WINDOW, True),
        Protocol("gptq", WINDOW, True),
        Protocol("lm-eval", None, True),
        Protocol("llama.cpp", 512, False),
    )
}
DOCUMENT = "document"
"""The protocol unless another one is asked for."""


def check(name: str, window: int | None) -> None:
    """Raises `UsageError` for a protocol that there is not, or a window in which nothing could be scored."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol {name!r}{suggest(name, list(PROTOCOLS))}; there are {', '.join(PROTOCOLS)}")
    least = 4 if name == "llama.cpp" else 2
    if window is not None and window < least:
        raise UsageError(f"a window of the protocol {name} must have at least {least} tokens, got {window}")


def window_tokens(name: str, asked: int | None, context: int) -> int:
    """The tokens N of a window for a model of this context.

    Raises `TextError` where it cannot take as many as were asked for, or as the protocol prescribes.
    """
    protocol = PROTOCOLS[name]
    length = asked or protocol.window or context
    if length <= context:
        return length
    if asked is None and protocol.cuts_to_context:
        return context
    raise TextError(
        f"the protocol {name} was to score windows of {length} tokens and the model's context is {context}; "
        f"give --window {context} or less"
    )


TEXT_COLUMNS = (
    "perplexity",
    "nll_per_token",
    "nll_difference",
    "nll_difference_stderr",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "kl_to_dense",
    "top1_agreement",
)
"""Columns whose figures depend on the protocol."""


def label(record: Record) -> str:
    """By what convention a row's text was scored, as `gptq 2048`: only rows with the same one can be compared."""
    name = str(record.settings.get("protocol", DOCUMENT))
    asked = record.settings.get("window")
    if name == DOCUMENT:
        return f"{name} {asked}" if asked else name
    window = record.provenance.get("text", {}).get("window", asked)
    return f"{name} {window}" if window else name
