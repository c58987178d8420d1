"""lm-eval's own command line, to which our systems are one more kind of model.

    effbench lm-eval --model effbench --model_args pretrained=MODEL,techniques=gptq:bits=4 --tasks piqa

lm-eval 0.4.13 has no entry point for models of other packages; a script of one's own imports this module first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from effbench import harness, models
from effbench.errors import UsageError
from effbench.measure.accuracy import SystemLM
from effbench.measure.task_data import local
from effbench.measure.tasks import REFERENCE
from effbench.suite import Suite


@register_model("effbench")
class EffbenchLM(SystemLM):
    """A model after a pipeline.

    pretrained: an embedded model, a folder, a hub id or a saved system. techniques: the pipeline, dense if empty.
    text, calibration, dtype, device, seed, allow_pickle, trust_remote_code: as for `effbench run`. lm-eval takes
    commas for its own, so what stands behind one is put back into the pipeline. How much is run at once is found
    without `batch_size`.
    """

    def __init__(
        self,
        pretrained: str = "ref-1m",
        techniques: str = "dense",
        text: str | None = None,
        calibration: str | None = None,
        dtype: str = "bfloat16",
        device: str | None = None,
        seed: int = 0,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        pipeline = techniques + "".join(f",{name}={_word(value)}" for name, value in options.items())
        if options and techniques == "dense":
            known = "pretrained, techniques, text, calibration, dtype, device, seed, allow_pickle, trust_remote_code"
            raise UsageError(f"--model_args has no option {next(iter(options))!r} (it has: {known})")
        # lm-eval says cuda:0 unless told otherwise, also where there is none
        resolved = harness.resolve_device("cpu" if device == "cpu" else "auto")
        suite = Suite(
            model=str(pretrained), text=text, calibration=calibration, dtype=dtype, device=resolved, seed=int(seed)
        )
        super().__init__(harness.applied(suite, pipeline, models.Trust(allow_pickle, trust_remote_code)))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results beside its own settings."""
        model = self.system.model
        return {"model_num_parameters": sum(one.numel() for one in model.parameters()), "model_dtype": str(model.dtype)}


def _word(value: Any) -> str:
    """As it was written: lm-eval has turned it into a number or a truth value."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def hand_over(words: Sequence[str]) -> None:
    """Do what the words ask of lm-eval; with `--task_data DIR` tasks get their items from that folder.

    Raises `UsageError` for words without which there is nothing to do.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    words, folder = _without(list(words), ("--task_data", "--task-data"))
    running = bool(words) and words[0] not in ("ls", "validate") and not {"-h", "--help"} & set(words)
    if running and not any(word.partition("=")[0] == "--include_path" for word in words):
        words = [*words, "--include_path", str(REFERENCE)]
    before, sys.argv = sys.argv, ["lm-eval", *words]
    try:
        setup_logging()
        parser = HarnessCLI()
        with local(Path(folder) if folder else None):
            parser.execute(parser.parse_args())
    finally:
        sys.argv = before


def _without(words: list[str], names: tuple[str, ...]) -> tuple[list[str], str | None]:
    """The words without one option, and what it said."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in names:
            continue
        if equals:
            return words[:place] + words[place + 1 :], value
        if place + 1 == len(words):
            raise UsageError(f"{name} needs a folder behind it")
        return words[:place] + words[place + 2 :], words[place + 1]
    return words, None
