"""Whether what pruning and low rank remove is gone from the time, too: a model wide enough to be bound by its matrices.

Times are of one process that holds all systems and goes round them, so that what slows the machine slows all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from effbench.evidence.table import NOT_YET, Line, Table, number

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from effbench.data import Windows
    from effbench.technique import System

RECORD = "wide.json"
SIZES = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 3, "num_attention_heads": 24}
STRUCTURED = (
    "shortgpt:sparsity=0.34",
    "llm_pruner:sparsity=0.2",
    "llm_pruner:sparsity=0.5",
    "slicegpt:sliced=0.25",
    "slicegpt:sliced=0.5",
    "fold:sparsity=0.34,steps=1,batch_size=1,length=16",
)
FACTORED = ("svd:keep=0.8", "svd:keep=0.5")
"""Shown without a claim: two narrow products each, whose own costs weigh more."""
PIPELINES = (*STRUCTURED, *FACTORED)
ROUNDS, NEW = 9, 9
PROMPTS = {"prefill": 128, "decode": 16}
"""Tokens behind which each is timed; few, since what attention does over the cache is no product with weights."""
CONTEXT = 16
"""Tokens of a calibration sequence: what is chosen to go does not matter here, only how much."""
WITHIN = 0.15
"""How far a ratio of times may be from that of parameters."""
TIMED = ("decode", "prefill")


class RandomText:
    """Text without meaning, for a model without knowledge."""

    def evaluation(self, length: int, limit: int | None) -> Windows:
        """Nothing here is evaluated."""
        raise NotImplementedError

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        """Token ids (count, length)."""
        import numpy as np

        return np.random.default_rng(seed).integers(3, 1024, (count, length))


def random_llama(**sizes: int) -> System:
    """A Llama with random weights in bfloat16 and a vocabulary that costs next to nothing."""
    import torch
    import transformers

    from effbench.reference.tokenizer import build_tokenizer
    from effbench.reference.world import World
    from effbench.technique import System

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=1024, max_position_embeddings=2048, tie_word_embeddings=False, **sizes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return System.dense(model.eval(), build_tokenizer(World().vocabulary))


def systems() -> Iterator[tuple[str, System]]:
    """The dense system and what each pipeline makes of it."""
    from effbench.data import Data
    from effbench.registry import parse

    yield "dense", random_llama(**SIZES)
    for pipeline in PIPELINES:
        system = random_llama(**SIZES)
        for technique in parse(pipeline):
            with _any_directions(type(technique).__module__):
                system = technique.apply(system, Data(RandomText(), CONTEXT, load=lambda name: random_llama()))
        yield pipeline, system


@contextmanager
def _any_directions(name: str) -> Iterator[None]:
    """While open, random directions stand in for principal ones: minutes of decompositions, and times are the same."""
    import sys
    from unittest import mock

    import torch

    from effbench.toolbox.low_rank import Directions

    def directions(scaled: Any) -> Directions:
        return Directions(
            torch.randn(len(scaled), min(scaled.shape)) / len(scaled) ** 0.5, torch.ones(min(scaled.shape))
        )

    def principal(hidden: list[Any], narrow: int, centres: bool) -> Any:
        return torch.randn(hidden[0].shape[-1], narrow) / hidden[0].shape[-1] ** 0.5

    with mock.patch.object(Directions, "of", directions):
        module = sys.modules[name]
        if hasattr(module, "principal"):
            with mock.patch.object(module, "principal", principal):
                yield
        else:
            yield


def multiplied(model: nn.Module) -> int:
    """Weights that a token meets in matrix products; one that several modules share counts for each of them."""
    from torch import nn

    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def measure(folder: Path) -> None:
    """Write the times to `folder`, unless they are there already."""
    if not (folder / RECORD).is_file():
        write(folder, dict(systems()))


def write(folder: Path, found: dict[str, System]) -> None:
    """Write what each system's rounds take."""
    import torch

    seconds = in_turn(found)
    weights = {name: multiplied(system.model) for name, system in found.items()}
    text = json.dumps({"sizes": SIZES, "torch": torch.__version__, "weights": weights, "seconds": seconds})
    (folder / RECORD).write_text(text.replace("}, ", "},\n") + "\n", encoding="utf-8")


def in_turn(found: dict[str, System], rounds: int = ROUNDS) -> dict[str, dict[str, list[float]]]:
    """Seconds of each system's rounds, on one thread; one more round warms up."""
    import torch

    from effbench.measure.speed import one_round

    torch.set_num_threads(1)
    prompts = {kind: torch.from_numpy(RandomText().training(1, length, 0)) for kind, length in PROMPTS.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in TIMED} for name in found}
    for turn in range(rounds + 1):
        for name, system in found.items():
            with torch.inference_mode():
                prefill, _, _ = one_round(system, prompts["prefill"], 2)
                _, decode, _ = one_round(system, prompts["decode"], NEW)
            if turn:
                seconds[name]["prefill"].append(prefill)
                seconds[name]["decode"].append(decode)
    return seconds


def _quartiles(own: Sequence[float], dense: Sequence[float]) -> list[float]:
    """Of the rounds' ratios: a round in which something else woke up counts as one, however long it took."""
    return quantiles([mine / other for mine, other in zip(own, dense, strict=True)], n=4, method="inclusive")


def table(folder: Path) -> Table:
    """Each pipeline's share of the weights beside its share of the time."""
    lines = []
    known = json.loads((folder / RECORD).read_text(encoding="utf-8")) if (folder / RECORD).is_file() else None
    for pipeline in PIPELINES:
        if known is None or pipeline not in known["weights"]:
            lines.append(Line([f"`{pipeline}`", *[NOT_YET] * (1 + 2 * len(TIMED))], claims=pipeline in STRUCTURED))
            continue
        share = known["weights"][pipeline] / known["weights"]["dense"]
        cells, fits = [f"`{pipeline}`", number(share, 3)], []
        for kind in TIMED:
            low, ratio, high = _quartiles(known["seconds"][pipeline][kind], known["seconds"]["dense"][kind])
            cells += [f"{number(ratio, 3)} [{number(low, 3)}–{number(high, 3)}]", number(ratio / share, 2)]
            fits.append(abs(ratio / share - 1) <= WITHIN)
        lines.append(Line(cells, all(fits), pipeline in STRUCTURED))
    sizes = ", ".join(f"{name.removeprefix('num_').replace('_', ' ')} {value:,}" for name, value in SIZES.items())
    return Table(
        "Time falls with the weights",
        f"On a model bound by its matrices, the time of a new token and of a prompt falls in proportion to the weights "
        f"that a token is multiplied with, within {100 * WITHIN:.0f} %.",
        ("pipeline", "weights / dense", "decode / dense", "off", "prefill / dense", "off"),
        lines,
        after=(
            f"a Llama with random weights in bfloat16: {sizes}; prompts of {PROMPTS['prefill']} tokens, and new "
            f"tokens behind {PROMPTS['decode']}; one thread",
            f"median of {ROUNDS} rounds in turn, [ ] their middle half; off: the time's ratio over that of the weights",
            "a weight that several blocks share counts for each: `fold` saves memory by sharing, and time only by "
            "the blocks that it removes",
            "wide enough: a product of one row reaches 13 GB/s of a 1024 x 1024 matrix, and 15 to 16 from 1536 x 1536 "
            "on, which is what half of this stream has (half of one 2,048 wide took 17 % longer than its share); "
            "`svd`, shown without a claim, has twice as many products, and half of them thin",
            "random directions stand in for principal ones while the systems are made, which no product notices",
        ),
    )
