"""Two sets of records -> what changed between them, each change a sentence that names its column.

Exact columns are compared over the same windows and items, so that a change is told from none by its own paired error.
Times are compared as ratios to dense of the same run, whose rounds were interleaved; the dense rows, which are timed
against themselves, say how far such a ratio strays on this machine with no reason at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from effbench.columns import BY_NAME, column
from effbench.errors import RecordError, UsageError
from effbench.measure import paired
from effbench.measure.claims import SPEEDUPS
from effbench.measure.comparable import differs, other_machine
from effbench.measure.derived import Row, accuracy_differences, nats_difference, rows, same_text
from effbench.protocols import DOCUMENT
from effbench.results import Record, load_all

SETTINGS = (
    *("protocol", "window", "dtype", "device", "tasks", "num_fewshot", "apply_chat_template", "limit"),
    *("batch", "prompt_tokens", "new_tokens"),
)
"""What has to be the same for two rows to answer the same question; paths may differ, their content may not."""
GROWING = (
    "overlap",
    "stored_bytes",
    "bits_per_weight",
    "bits_per_weight_model",
    "cache_bytes_per_token",
    "cache_bytes",
    "held_bytes",
    "saved_bytes",
    "decode_bytes_per_token",
    "decode_operations_per_token",
    "cost_tokens",
)
"""Exact columns without an error: more is worse."""
RANK = {"ok": 0, "unfit": 1}
"""How good a status is; every other one is worse."""


@dataclass(frozen=True)
class Thresholds:
    """What a change has to pass to count as one; each beside its standard errors or intervals where there are any.

    errors: standard errors of a paired difference. nats: nats per token. accuracy: share of items. relative: of a
    column that has no error. size: of stored bytes, bits and cache bytes. speed: of a ratio of times. memory,
    memory_bytes: of a peak, both.
    """

    errors: float = 3.0
    nats: float = 0.001
    accuracy: float = 0.005
    relative: float = 0.05
    size: float = 0.001
    speed: float = 0.25
    memory: float = 0.25
    memory_bytes: float = 32 * 2**20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise UsageError(f"the threshold {name} must be at least 0, got {value}")
        if self.speed >= 1:
            raise UsageError(f"the threshold speed must be below 1, got {self.speed}")


DEFAULT = Thresholds()


@dataclass(frozen=True)
class Finding:
    """One change. `better`: "better", "worse" or "" for a change that is neither; only "worse" is a regression."""

    pipeline: str
    column: str
    old: float | str | None
    new: float | str | None
    better: str
    sentence: str

    @property
    def is_regression(self) -> bool:
        """Whether this makes a comparison fail."""
        return self.better == "worse"


def compare(old: Path, new: Path, thresholds: Thresholds = DEFAULT) -> list[Finding]:
    """What changed from one folder of records to another, regressions first.

    Raises `RecordError` where a folder has no records or an unreadable one, or both did not measure the same thing.
    """
    before, after = _read(old), _read(new)
    dense = [row.record for row in [*before.values(), *after.values()] if row.record.pipeline == "dense"]
    floor = max((_strays(record, samples) for record in dense for samples, _ in SPEEDUPS.values()), default=0.0)
    found: list[Finding] = []
    apart: dict[str, str] = {}
    for key, was in before.items():
        if key not in after:
            found.append(_said(was, "status", was.record.status, None, "worse", f"there is no such row in {new}"))
            continue
        now = after[key]
        _same_question(was.record, now.record, old, new)
        found.extend(_status(was, now))
        if was.record.status == now.record.status == "ok":
            for compared in (_quality, _accuracy, _divergence, _sizes, _share):
                found.extend(compared(was, now, thresholds))
            reason = _not_timed_alike(was.record, now.record)
            if reason:
                apart[reason] = f"times and memory are not compared: {new} was measured {reason}"
            else:
                found.extend(_speed(was, now, thresholds, floor))
                found.extend(_memory(was, now, thresholds))
            found.extend(_lost(was, now))
    for key, now in after.items():
        if key not in before:
            found.append(_said(now, "status", None, now.record.status, "", f"it is new in {new}"))
    found.extend(Finding("", "", None, None, "", sentence) for sentence in apart.values())
    dirty = [str(folder) for folder, rows_there in ((old, before), (new, after)) if _is_dirty(rows_there.values())]
    if dirty:
        text = f"{' and '.join(dirty)} come from a checkout with changes: their commit does not say what was measured"
        found.append(Finding("", "", None, None, "", text))
    order = {"worse": 0, "better": 1, "": 2}
    return sorted(found, key=lambda finding: order[finding.better])


def _read(folder: Path) -> dict[tuple[str, int], Row]:
    records, errors = load_all(folder)
    if errors:
        raise errors[0]
    return {(row.record.pipeline, row.record.seed): row for row in rows(records)}


def _same_question(was: Record, now: Record, old: Path, new: Path) -> None:
    usual = {"protocol": DOCUMENT, "apply_chat_template": False}  # what was measured before there were others
    one, other = ({**usual, **record.settings, "model": Path(record.model).name} for record in (was, now))
    for name in ("model", *SETTINGS):
        if one.get(name) != other.get(name):
            raise RecordError(
                f"{old} and {new} answer different questions: {name} is {one.get(name)!r} in one and "
                f"{other.get(name)!r} in the other; compare runs of the same suite"
            )
    weights, others = (record.provenance.get("model_hash") for record in (was, now))
    if differs(weights, others) and was.pipeline == "dense":
        raise RecordError(f"{old} and {new} were measured with other weights of {was.model}; compare runs of the same")
    if "nll" in was.samples and "nll" in now.samples and not same_text(was, now):
        raise RecordError(f"{old} and {new} scored different text for {was.pipeline!r}; compare runs of one text")
    for name in was.samples:
        there = now.samples.get(name, was.samples[name])
        items, others = (record.provenance.get("items_hash", {}).get(name.partition("/")[2]) for record in (was, now))
        if name.startswith("correct/") and (len(there) != len(was.samples[name]) or (others and items != others)):
            raise RecordError(f"{old} and {new} have other items of {name.partition('/')[2]}; compare runs of the same")


def _not_timed_alike(was: Record, now: Record) -> str:
    """How times and peaks were had otherwise, "" where they were had in the same way."""
    threads, others = now.settings.get("threads"), was.settings.get("threads")
    if differs(threads, others):
        return f"with {threads} threads, and the other with {others}"
    machine = other_machine(was, now)
    return f"on another machine ({machine})" if machine else ""


def _is_dirty(rows_there: Iterable[Row]) -> bool:
    return any(row.record.provenance.get("dirty") for row in rows_there)


def _said(row: Row, name: str, old: float | str | None, new: float | str | None, better: str, text: str) -> Finding:
    return Finding(row.record.pipeline, name, old, new, better, f"{row.record.pipeline}: {text}")


def _moved(row: Row, name: str, old: float, new: float, worse: bool, why: str = "") -> Finding:
    """The finding for a column that went from one value to another."""
    kind = column(name)
    assert kind is not None, name
    verb = "rose" if new > old else "fell"
    change = f", {100 * (new / old - 1):+.3g} %" if old > 0 and new > 0 else ""
    text = f"{name} {verb} from {kind.text(old)} to {kind.text(new)} ({'worse' if worse else 'better'}{change}{why})"
    return _said(row, name, old, new, "worse" if worse else "better", text)


def _status(was: Row, now: Row) -> Iterator[Finding]:
    old, new = was.record.status, now.record.status
    if old != new:
        worse = RANK.get(new, 2) > RANK.get(old, 2)
        reason = f" ({now.record.reason})" if now.record.reason else ""
        better = "worse" if worse else "better" if RANK.get(new, 2) < RANK.get(old, 2) else ""
        yield _said(now, "status", old, new, better, f"status went from {old} to {new}{reason}")


def _quality(was: Row, now: Row, limits: Thresholds) -> Iterator[Finding]:
    """Nats per token, of all tokens and of each kind; perplexity and bits per byte are the same figure."""
    for name in now.record.samples:
        if not (name == "nll" or name.startswith("nll/")) or name not in was.record.samples:
            continue
        kind = name.partition("/")[2]
        difference, error = nats_difference(now.record, was.record, kind)
        error = 0.0 if math.isnan(error) else error
        if abs(difference) > max(limits.nats, limits.errors * error):
            key = f"nll_per_token/{kind}" if kind else "nll_per_token"
            old, new = was.values.get(key), now.values.get(key)
            if old is not None and new is not None:
                yield _moved(now, key, old, new, difference > 0, f", paired error {error:.2g}")


def _accuracy(was: Row, now: Row, limits: Thresholds) -> Iterator[Finding]:
    for name, (difference, error) in accuracy_differences(now.record, was.record).items():
        if abs(difference) > max(limits.accuracy, limits.errors * error):
            old, new = was.values.get(name), now.values.get(name)
            if old is not None and new is not None:
                yield _moved(now, name, old, new, difference < 0, f", paired error {error:.2g}")


def _divergence(was: Row, now: Row, limits: Thresholds) -> Iterator[Finding]:
    """Columns over the same tokens that carry no error of their own."""
    samples = now.record.samples
    tokens = sum(samples.get("compared_tokens") or samples.get("tokens", [])) or 1
    for name in ("accuracy_norm", "kl_to_dense", "top1_agreement", "tokens_per_pass", "acceptance_rate"):
        old, new = was.values.get(name), now.values.get(name)
        if old is None or new is None:
            continue
        least = limits.relative * abs(old)
        if name == "kl_to_dense":
            least = max(least, limits.nats / 10)
        if name == "top1_agreement":  # two binomial shares, as if of other tokens: an upper bound of the paired error
            least = limits.errors * math.sqrt(2 * max(old * (1 - old), new * (1 - new)) / tokens)
        if abs(new - old) > least:
            yield _moved(now, name, old, new, (new > old) == (BY_NAME[name].better == "lower"))


def _sizes(was: Row, now: Row, limits: Thresholds) -> Iterator[Finding]:
    for name in GROWING:
        old, new = was.values.get(name), now.values.get(name)
        if old is not None and new is not None and abs(new - old) > limits.size * abs(old):
            yield _moved(now, name, old, new, new > old)


def _share(was: Row, now: Row, limits: Thresholds) -> Iterator[Finding]:
    """A walk that finds less of the model than before."""
    old, new = was.values.get("compressed_share"), now.values.get("compressed_share")
    if old is not None and new is not None and abs(new - old) > limits.size:
        yield _moved(now, "compressed_share", old, new, new < old)


def _speed(was: Row, now: Row, limits: Thresholds, floor: float) -> Iterator[Finding]:
    """Ratios to dense, believed only when two views of them agree.

    The intervals of the rounds' ratios must not meet, and both these ratios and those of the fastest rounds must have
    changed by more than the threshold and the noise floor: other work on the machine only ever adds time, and it can
    sit on one of the two workers for all rounds.
    """
    for name, (samples, _) in SPEEDUPS.items():
        old, new = was.values.get(name), now.values.get(name)
        if not old or not new:
            continue
        low, high = (now.values.get(f"{name}_{end}") or new for end in ("low", "high"))
        old_low, old_high = (was.values.get(f"{name}_{end}") or old for end in ("low", "high"))
        changes = (math.log(new / old), math.log(_fastest(now, samples) / _fastest(was, samples)))
        least = floor - math.log(1 - limits.speed)
        slower, faster = high < old_low and max(changes) < -least, low > old_high and min(changes) > least
        if slower or faster:
            yield _moved(now, name, old, new, slower, ", intervals apart")


def _strays(dense: Record, samples: str) -> float:
    """How far from 1 a dense row's ratios to itself may lie, as a logarithm: what this machine makes of nothing."""
    if not dense.samples.get(f"dense_{samples}"):
        return 0.0
    found = paired.log_ratio(dense, samples)
    return max(map(abs, [*paired.strays(dense, samples)[0], *(e for e in (found.low, found.high) if math.isfinite(e))]))


def _fastest(row: Row, samples: str) -> float:
    """Dense time over this row's, each of its fastest round."""
    return min(row.record.samples[f"dense_{samples}"]) / min(row.record.samples[samples])


def _memory(was: Row, now: Row, limits: Thresholds) -> Iterator[Finding]:
    for name in ("peak_growth_bytes", "peak_device_bytes", "cost_peak_bytes", "cost_peak_device_bytes"):
        old, new = was.values.get(name), now.values.get(name)
        if old is None or new is None:
            continue
        if abs(new - old) > max(limits.memory_bytes, limits.memory * min(old, new)):
            yield _moved(now, name, old, new, new > old)


def _lost(was: Row, now: Row) -> Iterator[Finding]:
    """Columns that were measured and no longer are; energy and GPU memory depend on the machine and may go."""
    for name, old in was.values.items():
        known = column(name)
        lasting = known is not None and (name in SPEEDUPS or known.exact and not known.derived)
        if not lasting or old is None or now.values.get(name) is not None:
            continue
        reason = now.missing.get(name, "no reason given")
        yield _said(now, name, old, None, "worse", f"{name} is no longer measured ({reason})")
