"""Timed rounds of a system that alternate with the dense worker's, never both at once, each watched for disturbance.

Each follows the other, always: whichever ran last finds its caches warm and is a third faster for a few milliseconds.
Both run on the same cores, where fewer are asked for than there are. Disturbed rounds are done
again, as many as there are rounds; those that stay disturbed are kept and counted, and the row says so. Where the
ratio of decoding is still loose after that, there are more rounds: on a machine that others share, noise comes in
bursts. When to stop depends on how far rounds lie apart and not on where, so that no ratio is favoured by it.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from torch import Tensor

from effbench.measure import disturbance
from effbench.measure.disturbance import Moment
from effbench.measure.host import usable_cores
from effbench.measure.speed import one_round
from effbench.measure.statistics import trimmed_mean
from effbench.results import Record
from effbench.technique import Generation, System

LOOSE, MOST_TIMES, FEWEST = 0.02, 3, 8
"""With a standard error of the ratio above this there are up to so many times as many rounds; of fewer than `FEWEST`
rounds the error itself says little, and they are left as they are."""

TOO_SHORT = "the new tokens take too little time beside their prompt; use more --new-tokens or fewer --prompt-tokens"


def share_cores(threads: int) -> None:
    """Stay on as many cores as there are threads, the same ones in every process that is timed: cores differ.

    The last ones, since the first often serves interrupts. Where the system knows no affinity, nothing is done.
    """
    if hasattr(os, "sched_setaffinity"):
        usable_cores()  # a record tells the machine's, not those of this process
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


@dataclass(frozen=True)
class Round:
    """Seconds of prefill and of a new token, here and of the dense worker, and what went on beside them."""

    ours: tuple[float, float]
    theirs: tuple[float, float]
    others_share: float
    switches: int
    generation: Generation

    @property
    def is_disturbed(self) -> bool:
        """Whether others had more of the processors than a timing bears."""
        return self.others_share > disturbance.MOST


def rounds(
    system: System,
    prompts: list[Tensor],
    new_tokens: int,
    dense: Connection,
    condition: str = "",
) -> list[Round]:
    """One round for each prompt but the first, which warms both up; disturbed ones are repeated once.

    More, with the same prompts again, as long as the ratio is loose.
    """
    _ask(dense, condition, 0)
    one_round(system, prompts[0], new_tokens)
    done = [_round(system, prompts, new_tokens, dense, condition, number) for number in range(1, len(prompts))]
    for place, first in enumerate(done):
        if first.is_disturbed:
            again = _round(system, prompts, new_tokens, dense, condition, place + 1)
            done[place] = min(first, again, key=lambda one: one.others_share)
    asked = len(done)
    while FEWEST <= len(done) < MOST_TIMES * asked and log_ratios(done)[1][1] > LOOSE:
        done.append(_round(system, prompts, new_tokens, dense, condition, 1 + len(done) % asked))
    return done


def _round(
    system: System,
    prompts: list[Tensor],
    new_tokens: int,
    dense: Connection,
    condition: str,
    number: int,
) -> Round:
    before = Moment.now()
    theirs = _ask(dense, condition, number)
    prefill, decode, generation = one_round(system, prompts[number], new_tokens)
    after = Moment.now()
    share = disturbance.others_share(before, after, theirs[2])
    switches = after.switches - before.switches + int(theirs[3])
    return Round((prefill, decode), (theirs[0], theirs[1]), round(share, 3), switches, generation)


def _ask(dense: Connection, condition: str, number: int) -> list[float]:
    """A round of the dense worker: seconds of prefill, of a new token, of its processors, and forced switches."""
    dense.send_bytes(json.dumps([condition, number]).encode())
    found: list[float] = json.loads(dense.recv_bytes())
    return found


def answer(system: System, prompts: dict[str, list[Tensor]], new_tokens: int, candidate: Connection) -> None:
    """The dense worker's side: rounds of plain decoding until the candidate hangs up (`EOFError`)."""
    while True:
        condition, number = json.loads(candidate.recv_bytes())
        before = Moment.now()
        prefill, decode, _ = one_round(system, prompts[condition][number], new_tokens)
        after = Moment.now()
        spent, switches = after.own_seconds - before.own_seconds, after.switches - before.switches
        candidate.send_bytes(json.dumps([prefill, decode, spent, switches]).encode())


def put(record: Record, done: list[Round], condition: str = "") -> None:
    """Seconds of this row and of dense, round by round.

    A round in which noise swallowed the time of the new tokens has none; where half of the rounds are so, there is
    no figure.
    """
    part = f"/{condition}" if condition else ""
    for name, column, place in (
        ("prefill_seconds", "prefill_seconds", 0),
        ("decode_seconds", "decode_seconds_per_token", 1),
    ):
        kept = [one for one in done if one.ours[place] > 0 and one.theirs[place] > 0]
        if 2 * len(kept) <= len(done):
            record.put(f"{column}{part}", None, TOO_SHORT)
            continue
        record.samples[f"{name}{part}"] = [one.ours[place] for one in kept]
        record.samples[f"dense_{name}{part}"] = [one.theirs[place] for one in kept]
        record.put(f"{column}{part}", float(np.median(record.samples[f"{name}{part}"])))
    record.samples[f"others_share{part}"] = [one.others_share for one in done]
    record.samples[f"switches{part}"] = [one.switches for one in done]


def log_ratios(done: list[Round]) -> list[tuple[float, float]]:
    """The logarithm of dense time over ours, and its error: of prefill, and of decoding.

    Rounds without a time are left out.
    """
    found = []
    for place in (0, 1):
        both = [(one.theirs[place], one.ours[place]) for one in done if min(one.theirs[place], one.ours[place]) > 0]
        value, error = trimmed_mean([math.log(theirs / ours) for theirs, ours in both]) if both else (0.0, 0.0)
        found.append((float(value), float(error)))
    return found


def surroundings(before: dict[str, Any]) -> dict[str, Any]:
    """What the machine said of itself before and after the rounds, and why it did not."""
    after = disturbance.conditions()
    told = {name: [before.get(name), after.get(name)] for name in after}
    untold = {name: disturbance.UNKNOWN[name] for name in disturbance.UNKNOWN if after.get(name) is None}
    return {**told, "unknown": untold, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
