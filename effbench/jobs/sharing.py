"""What all rows of a run share, made once: text and questions as token ids, prompts, and the dense system itself.

<out>/dense/system/                 the dense system, saved as every other one, so that all come through one door
<out>/dense/windows.npz             the text that is scored
<out>/dense/log_probabilities.npy   the dense model's, on the first of its tokens (see `measure.quality`)
<out>/dense/prompts.npy             the prompts that are timed; the last of what applying the dense row leaves
<out>/dense/questions-*.npz         a task's items for one tokenizer; made by the first row that is asked them
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from effbench.data import Source, Windows
from effbench.protocols import window_tokens
from effbench.suite import Suite
from effbench.technique import System

if TYPE_CHECKING:
    from effbench.measure.questions import Questions


def folder(out: Path) -> Path:
    """Where it lies, until the run is complete."""
    return out / "dense"


def write(out: Path, suite: Suite, dense: System, source: Source | None) -> str:
    """Make the text and the prompts; where the prompts come from, in words."""
    shared = folder(out)
    shared.mkdir(parents=True, exist_ok=True)
    length = window_tokens(suite.protocol, suite.window, dense.context)
    windows = source.evaluation(length, suite.limit) if source else None
    if windows:
        windows.save(shared / "windows.npz")
    for condition, (batch, tokens) in suite.timed.items():
        asked = replace(suite, batch=batch, prompt_tokens=tokens)
        np.save(
            shared / f"prompts-{condition}.npy", _prompts(asked, windows, dense.context, dense.config.vocab_size)[0]
        )
    prompts, origin = _prompts(suite, windows, dense.context, dense.config.vocab_size)
    beside = shared / "prompts.partial.npy"
    np.save(beside, prompts)
    beside.replace(shared / "prompts.npy")
    return origin


def is_complete(out: Path) -> bool:
    """Whether it is all there."""
    return (folder(out) / "prompts.npy").is_file()


def windows(out: Path) -> Windows | None:
    """The text that is scored; `None` if there is none."""
    path = folder(out) / "windows.npz"
    return Windows.load(path) if path.is_file() else None


def questions(out: Path, suite: Suite, system: System) -> Questions:
    """The items of the suite's tasks for this system's tokenizer."""
    from effbench.measure.accuracy import build
    from effbench.measure.questions import Questions, fingerprint

    parts = []
    for name in suite.tasks:
        path = folder(out) / f"questions-{fingerprint(system.tokenizer, name, suite.limit, suite.asking)}.npz"
        if not path.is_file():
            build(system, [name], suite.limit, suite.asking).save(path)
        parts.append(Questions.load(path))
    return Questions.joined(parts)


def prompts(out: Path, device: torch.device, condition: str = "") -> list[Tensor]:
    """A prompt (batch, prompt + new tokens) for warming up and one for each round, under one condition."""
    name = f"prompts-{condition}.npy" if condition else "prompts.npy"
    return list(torch.from_numpy(np.load(folder(out) / name)).to(device))


def _prompts(suite: Suite, windows: Windows | None, context: int, vocabulary: int) -> tuple[np.ndarray, str]:
    """Token ids (rounds + 1, batch, tokens), and where they are from."""
    length = min(suite.prompt_tokens + suite.new_tokens, context)
    shape = (suite.rounds + 1, suite.batch, length)
    count = shape[0] * shape[1]
    if windows is None:  # a token's time does not depend on which it is; what a draft gets right does
        drawn = np.random.default_rng(suite.seed).integers(0, vocabulary, shape)
        return drawn, "random tokens, since no text was given"
    rows = [ids[:length] for ids in windows.ids if len(ids) >= length][:count]
    if len(rows) < count:  # short documents follow each other, and again from the start where there are too few
        return np.resize(np.concatenate(windows.ids), shape), "the text, its documents joined"
    return np.stack(rows).reshape(shape), "the text"
