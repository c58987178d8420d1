"""A regression is named and noise is not, in both directions of a comparison."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_records import ITEMS, record, write

from effbench.columns import BY_NAME
from effbench.compare import DEFAULT, Finding, Thresholds, compare
from effbench.errors import RecordError, UsageError
from effbench.results import Record


def changed(folder: Path, pipeline: str, change: Callable[[Record], Record | None], **limits: float) -> list[Finding]:
    """The findings between a folder and one in which one row was changed and the machine's load was another."""
    old = write(folder / "old", noise=1)
    new = write(folder / "new", noise=2, change=lambda row: change(row) if row.pipeline == pipeline else row)
    return compare(old, new, Thresholds(**limits))


def edited(**values: float | None) -> Callable[[Record], Record]:
    """A change of values."""

    def change(row: Record) -> Record:
        row.values.update(values)
        return row

    return change


def test_another_load_of_the_machine_alone_gives_no_finding(tmp_path: Path) -> None:
    old = write(tmp_path / "old", noise=0)
    for noise in range(1, 21):
        assert compare(old, write(tmp_path / "new", noise=noise)) == []


def test_a_bit_lost_by_one_technique_names_its_quality_columns(tmp_path: Path) -> None:
    found = changed(
        tmp_path,
        "rtn:bits=4",
        lambda row: record("rtn:bits=4", nats=0.15, stored=700_000, bits=4.5, promised=4, speed=1.8, noise=2),
    )
    columns = {finding.column for finding in found}
    assert {"nll_per_token", "accuracy", "kl_to_dense", "top1_agreement"} <= columns
    assert all(finding.is_regression and finding.pipeline == "rtn:bits=4" for finding in found)
    sentence = next(finding.sentence for finding in found if finding.column == "nll_per_token")
    assert sentence.startswith("rtn:bits=4: nll_per_token rose from ") and "\n" not in sentence
    assert not columns & {"stored_bytes", "decode_speedup", "peak_growth_bytes"}


def test_a_second_copy_of_the_weights_names_the_stored_bytes(tmp_path: Path) -> None:
    found = changed(tmp_path, "rtn:bits=4", edited(stored_bytes=1_400_000))
    assert [(f.column, f.is_regression) for f in found] == [("stored_bytes", True)]
    assert "rose from 700 kB to 1.40 MB (worse, +100 %)" in found[0].sentence


def test_bytes_may_not_grow_by_more_than_a_thousandth(tmp_path: Path) -> None:
    assert changed(tmp_path, "rtn:bits=4", edited(stored_bytes=700_600)) == []
    assert [f.column for f in changed(tmp_path, "rtn:bits=4", edited(stored_bytes=700_800))] == ["stored_bytes"]


def test_an_improvement_is_told_and_does_not_fail(tmp_path: Path) -> None:
    found = changed(tmp_path, "rtn:bits=4", edited(stored_bytes=600_000, kl_to_dense=0.01))
    assert {f.column for f in found} == {"stored_bytes", "kl_to_dense"}
    assert not any(f.is_regression for f in found) and all("better" in f.sentence for f in found)


def test_a_loss_below_three_standard_errors_is_noise(tmp_path: Path) -> None:
    def shaken(row: Record, by: float) -> Record:
        row.samples["nll"] = [value + 20 * (-1) ** k + by for k, value in enumerate(row.samples["nll"])]
        return row

    # each window moves by 20 nats one way or the other: the mean's error is 20 / sqrt(64) = 2.5 nats of a window
    assert changed(tmp_path, "rtn:bits=4", lambda row: shaken(row, 7)) == []
    assert [f.column for f in changed(tmp_path, "rtn:bits=4", lambda row: shaken(row, 8))] == ["nll_per_token"]


def test_a_kind_of_token_that_got_worse_is_named(tmp_path: Path) -> None:
    def with_kind(row: Record, nats: float) -> Record:
        row.samples["nll/copy"] = [nats + k % 3 for k in range(64)]
        row.samples["tokens/copy"] = [10] * 64
        row.put("nll_per_token/copy", nats / 10)
        return row

    old = write(tmp_path / "old", change=lambda row: with_kind(row, 5) if row.pipeline == "dense" else row)
    new = write(tmp_path / "new", change=lambda row: with_kind(row, 7) if row.pipeline == "dense" else row)
    assert [f.column for f in compare(old, new)] == ["nll_per_token/copy"]


def test_a_few_items_that_flip_are_noise_and_many_are_not(tmp_path: Path) -> None:
    def flipped(row: Record, count: int) -> Record:
        items = row.samples["correct/ref_copying"]
        right = [place for place in range(ITEMS) if items[place]][:count]
        row.samples["correct/ref_copying"] = [0 if place in right else item for place, item in enumerate(items)]
        row.values["accuracy/ref_copying"] = sum(row.samples["correct/ref_copying"]) / ITEMS
        return row

    assert changed(tmp_path, "rtn:bits=4", lambda row: flipped(row, 5)) == []
    found = changed(tmp_path, "rtn:bits=4", lambda row: flipped(row, 30))
    assert "accuracy/ref_copying" in {f.column for f in found} and all(f.is_regression for f in found)


@pytest.mark.parametrize(("factor", "columns"), [(1.15, []), (1.8, ["decode_speedup"])])
def test_only_a_real_loss_of_speed_is_named(tmp_path: Path, factor: float, columns: list[str]) -> None:
    def slower(row: Record) -> Record:
        row.samples["decode_seconds"] = [factor * value for value in row.samples["decode_seconds"]]
        return row

    assert [f.column for f in changed(tmp_path, "rtn:bits=4", slower)] == columns


def test_a_load_on_one_of_the_two_workers_in_most_rounds_is_not_a_loss_of_speed(tmp_path: Path) -> None:
    def disturbed(row: Record) -> Record:
        times = row.samples["decode_seconds"]
        row.samples["decode_seconds"] = [value * (1 if k < 2 else 4) for k, value in enumerate(times)]
        return row

    assert changed(tmp_path, "rtn:bits=4", disturbed) == []


def test_dense_rows_that_stray_from_themselves_raise_the_bar_for_speed(tmp_path: Path) -> None:
    def slower(row: Record) -> Record:
        by = {"rtn:bits=4": [1.8] * 8, "dense": [1, 3, 1, 3, 1, 3, 1, 3]}.get(row.pipeline)
        if by:
            row.samples["decode_seconds"] = [v * f for v, f in zip(row.samples["decode_seconds"], by, strict=True)]
        return row

    assert compare(write(tmp_path / "old", noise=1), write(tmp_path / "new", noise=2, change=slower)) == []


@pytest.mark.parametrize(("bytes_", "found"), [(60e6, False), (200e6, True)])
def test_a_peak_has_to_grow_by_a_quarter_and_by_32_mib(tmp_path: Path, bytes_: float, found: bool) -> None:
    findings = changed(tmp_path, "rtn:bits=4", edited(peak_growth_bytes=bytes_))
    assert [f.column for f in findings] == ["peak_growth_bytes"] * found


def test_a_row_that_fails_or_is_gone_is_a_regression_and_a_new_one_is_not(tmp_path: Path) -> None:
    def fails(row: Record) -> Record:
        row.status, row.reason = "failed", "scoring failed: ValueError"
        return row

    (finding,) = changed(tmp_path / "a", "rtn:bits=4", fails)
    assert finding.is_regression and "from ok to failed (scoring failed: ValueError)" in finding.sentence
    (finding,) = changed(tmp_path / "b", "rtn:bits=4", lambda row: None)
    assert finding.is_regression and "there is no such row" in finding.sentence
    (finding,) = compare(tmp_path / "b" / "new", tmp_path / "b" / "old")
    assert not finding.is_regression and "new" in finding.sentence
    (finding,) = compare(tmp_path / "a" / "new", tmp_path / "a" / "old")
    assert finding.better == "better"


def test_a_figure_that_is_no_longer_measured_is_a_regression_also_where_it_is_nan(tmp_path: Path) -> None:
    def lost(row: Record) -> Record:
        row.put("cache_bytes_per_token", None, "the cache hides its tensors")
        row.values["kl_to_dense"] = math.nan
        return row

    found = changed(tmp_path, "rtn:bits=4", lost)
    assert {f.column for f in found} == {"cache_bytes_per_token", "kl_to_dense"} and all(f.is_regression for f in found)
    assert "the cache hides its tensors" in found[0].sentence + found[1].sentence


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.provenance.update(data_hash="other"), "scored different text for 'dense'"),
        (lambda row: row.settings.update(dtype="float32"), "dtype is 'bfloat16' in one and 'float32' in the other"),
        (lambda row: row.samples.update({"correct/ref_copying": [1]}), "other items of ref_copying"),
        (lambda row: row.settings.update(num_fewshot=5), "num_fewshot is None in one and 5 in the other"),
        (lambda row: row.settings.update(apply_chat_template=True), "apply_chat_template is False in one and True"),
    ],
    ids=["text", "dtype", "items", "fewshot", "chat"],
)
def test_runs_that_did_not_measure_the_same_are_refused(
    tmp_path: Path, spoil: Callable[[Record], None], message: str
) -> None:
    def change(row: Record) -> Record:
        spoil(row)
        return row

    old, new = write(tmp_path / "old"), write(tmp_path / "new", change=change)
    with pytest.raises(RecordError, match=message):
        compare(old, new)


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="nats must be at least 0, got -1"):
        Thresholds(nats=-1)
    with pytest.raises(UsageError, match="speed must be below 1, got 1"):
        Thresholds(speed=1)
    assert set(vars(DEFAULT)) == set(vars(Thresholds()))


def test_times_of_another_machine_or_thread_count_are_not_subtracted_and_other_weights_not_at_all(
    tmp_path: Path,
) -> None:
    def slower(row: Record) -> Record:
        if row.pipeline == "rtn:bits=4":
            row.samples["decode_seconds"] = [1.8 * value for value in row.samples["decode_seconds"]]
        return row

    def elsewhere(row: Record) -> Record:
        row.provenance["machine"] = {"cpu": "B Processor", "cores": 2}
        return slower(row)

    def threaded(row: Record) -> Record:
        row.settings["threads"] = 8
        return slower(row)

    def dirty(row: Record) -> Record:
        row.provenance["dirty"] = True
        return row

    def hashed(row: Record, digest: str) -> Record:
        row.provenance["model_hash"] = digest
        return row

    old = write(tmp_path / "old", change=None)
    assert any(finding.is_regression for finding in compare(old, write(tmp_path / "slow", change=slower)))
    for name, change, said in (
        ("elsewhere", elsewhere, "another machine (cpu B Processor)"),
        ("threaded", threaded, "8 threads, and the other with 2"),
        ("dirty", dirty, "checkout with changes"),
    ):
        (found,) = compare(old, write(tmp_path / name, change=change))
        assert said in found.sentence and not found.is_regression
    first = write(tmp_path / "first", change=lambda row: hashed(row, "one"))
    with pytest.raises(RecordError, match="other weights"):
        compare(first, write(tmp_path / "second", change=lambda row: hashed(row, "another")))


def test_every_exact_column_that_can_get_worse_is_watched() -> None:
    from effbench import compare as module

    text = Path(module.__file__).read_text()
    same_as_nats = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    measured = [c for c in BY_NAME.values() if c.exact and c.better and not c.derived]
    watched = [c.name for c in measured if c.name not in same_as_nats]
    assert [name for name in watched if f'"{name}"' not in text and name not in ("nll_per_token", "accuracy")] == []
