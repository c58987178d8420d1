"""Text cut into windows by the published protocols of perplexity (see `effbench.protocols`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effbench.data import FileSource, Windows, read_documents
from effbench.errors import TextError, UnfitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StreamSource(FileSource):
    """Text by a published protocol: all of it is scored, so techniques read nothing but `calibration`."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, calibration: Path | None, protocol: str) -> None:
        self.path, self._tokenizer, self._protocol = path, tokenizer, protocol
        self._training = np.concatenate(self._encode(calibration)) if calibration else np.zeros(0, np.int64)

    def evaluation(self, length: int, limit: int | None) -> Windows:
        """Windows of `length` tokens; `limit` is of windows, for `lm-eval` of documents, as its own limit is."""
        made = {"gptq": self._gptq, "lm-eval": self._lm_eval, "llama.cpp": self._llama_cpp}[self._protocol]
        windows = made(length, limit)
        if not windows.ids:
            raise TextError(
                f"{self.path} does not fill a window of {length} tokens, and the protocol {self._protocol} scores "
                "nothing else; give a longer text or a shorter --window"
            )
        return windows

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        if not len(self._training):
            raise UnfitError(
                f"needs calibration text, and the protocol {self._protocol} scores all of --text; "
                "use --calibration FILE"
            )
        return super().training(count, length, seed)

    def _gptq(self, length: int, limit: int | None) -> Windows:
        ids = self._stream("\n\n".join(rows(self.path)))
        cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]
        return self._counted(cut, 1, len(ids), length)

    def _llama_cpp(self, length: int, limit: int | None) -> Windows:
        text = "".join(row or " \n" for row in found) if (found := _wikitext(self.path)) else "\n".join(rows(self.path))
        ids = self._stream(text.removesuffix("\n"))  # the tool drops one newline at the end of a file
        if len(ids) < 2 * length:
            raise TextError(f"llama.cpp refuses a text of fewer than two windows; {self.path} has {len(ids)} tokens")
        cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]
        start = self._tokenizer.bos_token_id
        if start is not None and self._tokenizer("")["input_ids"][:1] == [start]:
            cut = [np.concatenate([[start], window[1:]]) for window in cut]
        return self._counted(cut, length // 2 + 1, len(ids), length)

    def _lm_eval(self, length: int, limit: int | None) -> Windows:
        from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

        start = self._tokenizer.bos_token_id
        prefix, found = start if start is not None else self._tokenizer.eos_token_id, pages(self.path)[:limit]
        windows: list[np.ndarray] = []
        read: list[int] = []
        tokens = 0
        for page in found:
            ids = self._tokenizer(wikitext_detokenizer({"page": page}), verbose=False)["input_ids"]
            tokens += len(ids)
            for window, first in rolling(ids, prefix or 0, length):
                windows.append(window)
                read.append(first)
        return Windows(
            windows,
            bytes_scored=sum(len(page.encode()) for page in found),
            words_scored=sum(len(re.split(r"\s+", page)) for page in found),
            read_only=read,
            text_tokens=tokens,
            window_tokens=length,
        )

    def _stream(self, text: str) -> np.ndarray:
        """As published code calls its tokenizer: one that puts a start token before a text does so once."""
        return np.array(self._tokenizer(text, verbose=False)["input_ids"], np.int64)

    def _counted(self, windows: list[np.ndarray], read: int, tokens: int, length: int) -> Windows:
        texts = [self._tokenizer.decode(ids[read:]) for ids in windows]
        words, count = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
        firsts = [read] * len(windows)
        return Windows(windows, count, words_scored=words, read_only=firsts, text_tokens=tokens, window_tokens=length)


def rolling(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[np.ndarray, int]]:
    """A text's tokens in windows, each with how many at its start are only read.

    `length` tokens are fed at a time, and the last one of a window is not. The first window follows `prefix`, the
    others the token before them; the last one is filled up from the front (lm-eval's rolling windows with a context
    of one token, made disjoint).
    """
    before = np.array([prefix, *ids], np.int64)
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = min(start, max(0, end - length))
        yield before[first : end + 1], start - first + 1


def rows(path: Path) -> list[str]:
    """The rows of the text: those of WikiText's data set, else the documents of the file, blank ones too."""
    return _wikitext(path) or read_documents(path, blank=True)


def pages(path: Path) -> list[str]:
    """The documents of a `.jsonl` file as they are; a `.txt` file is cut before each of WikiText's main headings.

    A text without such headings is one page (EleutherAI/wikitext_document_level, which lm-eval reads, cuts so).
    """
    if path.suffix != ".txt":
        return read_documents(path)
    found = _wikitext(path)
    text = "".join(row or " \n" for row in found) if found else read_documents(path)[0]
    cut: list[list[str]] = [[]]
    for line in text.split("\n"):
        squeezed = line.replace("= = =", "===").replace("= =", "==").strip()
        if squeezed.startswith("= ") and squeezed.endswith(" ="):
            cut.append([])
        cut[-1].append(line)
    joined = ["\n".join(lines) for lines in cut]
    return [page for page in joined[:-1] if page.strip()] + joined[-1:]


def _wikitext(path: Path) -> list[str]:
    """The rows of WikiText's data set from either form of its text; empty for another text."""
    text = read_documents(path)[0] if path.suffix == ".txt" else ""
    if re.fullmatch(r"(?: \n| [^\n]* \n)+", text):
        return ["" if line.isspace() else line for line in re.findall(r"[^\n]*\n", text)]
    if re.fullmatch(r"(?: [^\n]* \n)?(?:\n\n(?: [^\n]* \n)?)+", text):
        return re.findall(r"(?:^|\n\n)( [^\n]* \n|)", text)
    return []
