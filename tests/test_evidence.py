"""The tables of claims: figures that are known beforehand, and rows that are measured, kept small and kept."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from synthetic_records import TOKENS, WINDOWS, ended, record

from effbench import reference, registry, results, suite
from effbench.errors import RecordError
from effbench.evidence import FOLDER, facts, measure, orderings, others, training
from effbench.evidence.page import page, tables
from effbench.evidence.rows import Rows
from effbench.evidence.table import Line, Table
from effbench.measure.derived import nats_difference
from effbench.reference.train import SIZES
from effbench.results import Record


def test_parameters_are_those_of_the_blocks_that_ship() -> None:
    for name in reference.NAMES:
        with safe_open(reference.folder(name) / "model.safetensors", "pt") as stored:
            blocks = [key for key in stored.keys() if ".layers." in key]  # noqa: SIM118
            count = sum(math.prod(stored.get_slice(key).get_shape()) for key in blocks)
        assert training.block_parameters(SIZES[name.removeprefix("ref-")]) == count


def run(size: str, nats: float, noise: float = 0.0, seed: int = 0, rows: bool = True) -> training.Run:
    """A training record whose rows lie around `nats`, all sizes' by the same text and each by noise of its own."""
    text = np.random.default_rng(0).normal(0, 0.1, 256)
    own = np.random.default_rng(len(size) + seed).normal(0, 1, 256)
    by_row = (nats + text - text.mean() + noise * (own - own.mean())).tolist() if rows else []
    parameters = training.block_parameters(SIZES[size])
    return training.Run(size, seed, 10**6, 60.0, "cpu", nats, {"noise": nats}, {"copying": 0.8}, by_row, parameters)


def lawful() -> list[training.Run]:
    """Six sizes on a law, apart by far more than their errors."""
    counts = [training.block_parameters(SIZES[size]) for size in SIZES]
    exact = [1.1 + 0.45 * (count / counts[0]) ** -0.3 for count in counts]
    assert training.law(counts, exact) == pytest.approx((1.1, 0.45, 0.3), rel=1e-4)
    return [run(size, nats, 0.001, seed) for size, nats in zip(SIZES, exact, strict=True) for seed in range(3)]


def test_neighbouring_sizes_have_to_lie_five_paired_errors_apart() -> None:
    found = lawful()
    table = training.scaling(found)
    assert [line.holds for line in table.lines] == [True] * 6
    assert any(re.fullmatch(r"on 1M tokens each a law leaves up to 0\.000\d nats", said) for said in table.after)
    gap = found[9].nats - found[6].nats  # the standard error of 256 rows with noise 16 is 1
    for errors, holds in ((6, True), (4, False)):
        noisy = [run("550k", found[9].nats, -gap / errors * 16) for _ in range(3)]
        line = training.scaling([*found[:9], *noisy, *found[12:]]).lines[3]
        assert float(line.cells[7]) == pytest.approx(-errors, rel=0.05) and line.holds is holds
    assert training.scaling([*found[:17], run("3m", found[17].nats, rows=False)]).lines[5].holds is None


def test_seeds_of_a_size_count_by_their_mean() -> None:
    found = lawful()
    apart = [replace(one, nats=one.nats + off) for one, off in zip(found[:3], (-0.1, 0.0, 0.1), strict=True)]
    line = training.scaling([*apart, *found[3:]]).lines[0]
    assert line.cells[2:6] == ["1", "3", f"{found[0].nats:.4f}", "0.2000"] and line.holds
    assert training.scaling([*apart[:2], *found[3:]]).lines[0].holds is None


def test_a_size_off_the_law_is_named() -> None:
    found = lawful()
    off = [replace(one, nats=one.nats + 0.02) for one in found[6:9]]
    assert not all(line.holds for line in training.scaling([*found[:6], *off, *found[9:]]).lines)
    assert training.scaling(found[:15]).claims == [None] * 5


def test_the_law_is_of_the_longest_runs_in_three_seeds() -> None:
    found = lawful()
    short = [replace(one, nats=one.nats + 0.5, tokens=one.tokens // 2, ships=True) for one in found[::3]]
    long = replace(found[0], nats=found[0].nats - 0.5, tokens=2 * found[0].tokens)  # a single seed
    mixed = training.scaling([*short, *found, long])
    assert mixed == training.scaling(found) and mixed.claims == [True] * 6


def test_accuracy_stands_beside_its_error_and_what_guessing_gives(tmp_path: Path) -> None:
    dense = record("dense")
    dense.put("accuracy_chance/ref_copying", 0.125)
    folder = folder_of(tmp_path, "ref-1m-tasks", dense)
    assert [line.cells[1] for line in training.accuracies([run("1m", 1.3)], folder).lines] == ["0.800 ±0.013", "0.125"]


def folder_of(folder: Path, name: str, *rows: Record) -> Path:
    """A folder of evidence with these rows under one suite's name."""
    for row in rows:
        results.save(row, folder / name)
    return folder


def test_an_ordering_holds_by_errors_and_by_its_factor(tmp_path: Path) -> None:
    rows = [record("dense"), record("rtn:bits=4", nats=0.02), record("rtn:bits=3", nats=0.08)]
    rows += [record("bitnet", nats=0.5), record("bitnet:steps=0", nats=4.0), record("gptq:bits=3", nats=0.081)]
    rows += [ended("sparsegpt", "failed", "applying failed"), record("magnitude:sparsity=0.5", nats=0.1)]
    held = {
        tuple(line.cells[index].strip("`") for index in (0, 1, 3)): line.holds
        for line in orderings.table(folder_of(tmp_path, "ref-1m", *rows)).lines
    }
    assert held["ref-1m", "rtn:bits=4", "rtn:bits=3"] is True
    assert held["ref-1m", "gptq:bits=3", "rtn:bits=3"] is False, "it adds more"
    assert held["ref-1m", "bitnet", "bitnet:steps=0"] is False, "8 times, where 10 are asked for"
    assert held["ref-1m", "sparsegpt", "magnitude:sparsity=0.5"] is False, "one of them has failed"
    assert held["ref-1m", "rtn:bits=3", "rtn:bits=2"] is None
    assert held["ref-3m", "rtn:bits=4", "rtn:bits=3"] is None


def test_rows_of_other_text_are_not_compared(tmp_path: Path) -> None:
    other = record("rtn:bits=4", nats=0.02)
    other.provenance["data_hash"] = "other"
    rows = Rows.of(folder_of(tmp_path, "ref-1m", record("dense"), other), "ref-1m")
    assert rows.above("rtn:bits=4") is None


def with_kinds(row: Record, **nats: float) -> Record:
    """The row with 10 tokens of each kind in each window, which lose so many nats; noise is each window's own."""
    random = np.random.default_rng(len(row.pipeline))
    for kind, value in nats.items():
        row.samples[f"tokens/{kind}"] = [10] * WINDOWS
        row.samples[f"nll/{kind}"] = (10 * value * random.normal(1, 0.1, WINDOWS)).tolist()
    return row


def test_rare_over_frequent_is_a_ratio_with_an_interval_around_it() -> None:
    dense = with_kinds(record("dense"), fact_frequent=0.0, fact_rare=0.0)
    row = with_kinds(record("rtn:bits=3"), fact_frequent=0.2, fact_rare=0.6)
    ratio, low, high = facts.rare_over_frequent(row, dense)
    assert low < ratio < high and ratio == pytest.approx(3, rel=0.05)
    # the error of a ratio of two means of 64 windows with a spread of a tenth each
    assert (high - low) / (2 * 1.96) == pytest.approx(3 * 0.1 * math.sqrt(2 / WINDOWS), rel=0.25)
    assert facts.rare_over_frequent(row, dense) == (ratio, low, high)
    helped = with_kinds(record("rtn:bits=8"), fact_frequent=-0.1, fact_rare=0.1)
    assert facts.rare_over_frequent(helped, dense) == (math.inf, math.inf, math.inf)


def test_what_is_guessed_counts_no_bits_and_what_is_known_counts_all() -> None:
    known = facts.fact_bits()
    whole = sum(map(sum, known.values()))
    row = record("dense")

    def stored(frequent: float, rare: float) -> float:
        row.values |= {"nll_per_token/fact_frequent": frequent, "nll_per_token/fact_rare": rare}
        return facts.bits_stored(row, known)

    assert stored(0, 0) == pytest.approx(whole)
    assert stored(math.log(64), 9.0) == 0
    assert stored(0, 9.0) == pytest.approx(sum(known["fact_frequent"]))
    assert stored(math.log(4), 9.0) == pytest.approx(sum(known["fact_frequent"]) - 2 * len(known["fact_frequent"]))


def test_eviction_holds_where_lookups_fall_and_text_stands_still(tmp_path: Path) -> None:
    kinds = {"template": 0.1, "noise": 2.0, "context": 0.3}

    def verdict(noise: float, right: float) -> bool | None:
        evicted = with_kinds(record(others.EVICTED), **{**kinds, "noise": 2.0})
        evicted.samples["nll/noise"] = [value + 10 * noise for value in dense.samples["nll/noise"]]
        evicted.samples["nll/template"] = list(dense.samples["nll/template"])
        count = len(dense.samples["correct/ref_retrieval"])
        evicted.samples["correct/ref_retrieval"] = [int(item < right * count) for item in range(count)]
        folder = folder_of(tmp_path, "ref-1m", dense, evicted)
        return others.eviction(folder).lines[0].holds

    dense = with_kinds(record("dense"), **kinds)
    assert verdict(0.01, 0.4) is True
    assert verdict(0.05, 0.4) is False  # 0.025 with as many tokens of template, which stand still
    assert verdict(0.01, 0.7) is False


def test_a_table_says_which_lines_hold() -> None:
    table = Table(
        "T", "So.", ("a", "b"), [Line(["1", "2"], True), Line(["3", "4"], False), Line(["5", "6"], claims=False)]
    )
    assert table.claims == [True, False]
    assert "| a | b | holds |\n|---|---:|---:|\n| 1 | 2 | yes |\n| 3 | 4 | **no** |\n| 5 | 6 |  |\n" in table.markdown()


def test_the_suites_ask_what_the_tables_show_in_canonical_form() -> None:
    asked = {path.parent.name: suite.load(str(path)).techniques for path in FOLDER.glob("*/suite.toml")}
    plain = {pipeline for ordering in orderings.PLAIN for pipeline in ordering[:2]}
    plain |= {*facts.DAMAGED, *facts.ROUNDED, others.EVICTED}
    students = {pipeline for pair in others.STUDENTS for pipeline in pair}
    shown = {
        "ref-70k": {*facts.ROUNDED},
        "ref-300k": {*facts.ROUNDED},
        "ref-1m": plain,
        "ref-3m": plain | students,
        "ref-1m-outliers": {"awq:bits=4", "rtn:bits=4"},
        "ref-3m-outliers": {"awq:bits=4", "rtn:bits=4"},
        "ref-1m-tasks": set(),
        "ref-3m-tasks": set(),
        "draft": {*others.DRAFTS},
    }
    assert {name: {*pipelines} for name, pipelines in asked.items()} == {
        name: pipelines - {"dense"} for name, pipelines in shown.items()
    }
    for pipeline in {pipeline for pipelines in asked.values() for pipeline in pipelines}:
        assert registry.canonical(pipeline) == pipeline


def test_a_page_without_rows_says_that_nothing_is_measured_yet(tmp_path: Path) -> None:
    measured = [table for table in tables(tmp_path) if table.title not in ("Training runs", "Scaling law")]
    assert {holds for table in measured for holds in table.claims} == {None}
    assert "- Orderings: 0 of 24 lines hold, 24 are not measured yet\n" in page(tmp_path)


def test_rows_are_made_small_without_changing_what_tables_show(tmp_path: Path) -> None:
    dense, row = record("dense"), record("rtn:bits=4", nats=0.03)
    before = nats_difference(row, dense)
    paths = [measure.save_small(each, tmp_path) for each in (dense, row)]
    again = [results.load(path) for path in paths]
    assert nats_difference(again[1], again[0]) == pytest.approx(before, abs=2e-3 / TOKENS)
    assert again[1].samples["correct/ref_retrieval"] == row.samples["correct/ref_retrieval"]
    assert "prefill_seconds" not in again[1].values and again[1].values["stored_bytes"] == row.values["stored_bytes"]
    assert measure.save_small(again[1], tmp_path).read_text() == paths[1].read_text()


def test_a_folder_without_suites_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no folder with a suite.toml"):
        measure.measure(tmp_path)


def test_what_answers_the_question_is_kept_and_the_rest_is_measured_anew(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "suite.toml").write_text(
        'model = "ref-70k"\ntasks = ["ref_copying"]\nlimit = 2\nthreads = 1\nrounds = 1\nprompt_tokens = 8\n'
        'new_tokens = 2\ntechniques = ["rtn:bits=4"]\n'
    )
    measure.measure(tmp_path)
    dense, rounded = (folder / "records" / f"{name}--seed0.json" for name in ("dense", "rtn-bits=4"))
    first, kept = json.loads(rounded.read_text()), dense.read_text()
    assert first["status"] == "ok" and len(first["samples"]["nll/noise"]) == 2
    stale = {
        **first,
        "provenance": {**first["provenance"], "inputs": {**first["provenance"]["inputs"], "code": "other"}},
    }
    stale["values"] = {**first["values"], "nll_per_token": 0.0}
    rounded.write_text(json.dumps(stale))
    measure.measure(tmp_path)
    assert json.loads(rounded.read_text())["values"] == first["values"]
    assert dense.read_text() == kept
