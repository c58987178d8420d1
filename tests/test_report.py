"""What a reader sees: every figure with its error, every dash with its reason, nothing that noise could have made."""

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from synthetic_records import TOKENS, WINDOWS, ended, record, write

import effbench
from effbench import results
from effbench.columns import COLUMNS
from effbench.measure.derived import Row, rows
from effbench.report import chart, terminal
from effbench.report.frame import column_names, row_dicts
from effbench.report.markdown import markdown
from effbench.report.page import page
from effbench.report.progress import BarProgress, PlainProgress

STACK = "rtn:bits=4+sink_window:window=124+draft:model=ref-70k"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


@pytest.fixture
def found(folder: Path) -> list[Row]:
    return rows(results.load_all(folder)[0])


def drawn(found: list[Row], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    terminal.show(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_difference_to_dense_and_its_error_are_those_of_the_windows(found: list[Row]) -> None:
    dense, rtn = found[0], found[1]
    pairs = np.array(rtn.record.samples["nll"]) - np.array(dense.record.samples["nll"])
    assert rtn.values["nll_difference"] == pytest.approx(pairs.sum() / (TOKENS * WINDOWS))
    assert rtn.values["nll_difference_stderr"] == pytest.approx(pairs.std(ddof=1) / math.sqrt(WINDOWS) / TOKENS)
    assert dense.values["nll_difference"] == 0


def test_the_error_of_the_mean_accuracy_is_that_of_independent_tasks(found: list[Row]) -> None:
    shares = [found[1].values[f"accuracy/{task}"] or 0 for task in ("ref_copying", "ref_retrieval")]
    expected = math.sqrt(sum(p * (1 - p) / 199 for p in shares)) / 2
    assert found[1].values["accuracy_stderr"] == pytest.approx(expected)


def test_the_speedup_is_found_within_its_interval(found: list[Row]) -> None:
    low, middle, high = (found[1].values[f"decode_speedup{end}"] or 0 for end in ("_low", "", "_high"))
    assert low < 1.8 < high and low < middle < high and high - low < 0.5


def test_only_differences_within_noise_are_marked(found: list[Row]) -> None:
    by_name = {row.record.pipeline: row for row in found}
    assert not by_name["dense"].within_noise
    assert "decode_speedup" not in by_name["rtn:bits=4"].within_noise
    assert "nll_difference" not in by_name["rtn:bits=4"].within_noise
    assert "decode_speedup" in by_name["magnitude:sparsity=0.5"].within_noise
    noisy = record("wobble")
    noisy.samples["nll"] = [value + 5 * (-1) ** k for k, value in enumerate(noisy.samples["nll"])]
    noisy.samples["nll"][0] += 1
    assert "nll_difference" in rows([found[0].record, noisy])[1].within_noise


def test_a_speedup_within_what_dense_strays_from_itself_is_noise() -> None:
    dense, fast = record("dense"), record("rtn:bits=4", speed=1.8)
    assert "decode_speedup" not in rows([dense, fast])[1].within_noise
    times = dense.samples["decode_seconds"]
    dense.samples["decode_seconds"] = [value * (1 if k % 2 else 4) for k, value in enumerate(times)]
    assert "decode_speedup" in rows([dense, fast])[1].within_noise


@pytest.mark.parametrize(
    ("bits", "promised", "dtype", "expected"),
    [
        (16.0, 8, "bfloat16", True),
        (4.5, 4, "bfloat16", False),
        (9.9, 4, "bfloat16", False),
        (10.1, 4, "bfloat16", True),
        (16.0, 16, "bfloat16", False),
        (16.0, 8, "float32", False),
        (32.0, 8, "float32", True),
        (16.0, None, "bfloat16", False),
    ],
)
def test_a_promise_that_the_bytes_do_not_keep_is_called_simulated(
    bits: float, promised: float | None, dtype: str, expected: bool
) -> None:
    row = record("any", bits=bits, promised=promised)
    row.settings["dtype"] = dtype
    assert rows([row])[0].simulated is expected


@pytest.mark.parametrize(
    ("held", "bits", "tokens", "expected"),
    [
        (100.0, 4, None, True),  # codes kept beside, or in place of nothing
        (30.0, 4, None, False),
        (64.0, 4, None, True),
        (100.0, None, 64, True),  # evicted from attention, not from memory
        (26.0, None, 64, False),
        (100.0, None, 512, False),  # more than there is promises nothing
        (26.0, 8, 64, False),  # nearer to an eighth than to all
        (60.0, 8, 64, True),
    ],
)
def test_a_cache_that_is_not_as_small_as_promised_is_called_simulated(
    held: float, bits: float | None, tokens: float | None, expected: bool
) -> None:
    dense, row = record("dense"), record("any")
    dense.values["cache_bytes_per_token"] = 100.0
    row.values |= {"nominal_cache_bits": bits, "nominal_cache_tokens": tokens}
    row.samples |= {"cache_tokens": [256.0], "cache_bytes": [256 * held]}
    assert rows([dense, row])[1].simulated is expected


def test_a_row_of_another_text_is_not_compared_with_dense(found: list[Row]) -> None:
    other = record("rtn:bits=4", nats=0.03)
    other.provenance["data_hash"] = "another"
    row = rows([found[0].record, other])[1]
    assert row.values["nll_difference"] is None
    assert "another text" in row.missing["nll_difference"]


def test_a_figure_that_is_not_finite_is_missing_and_says_so(found: list[Row]) -> None:
    row = record("broken")
    row.values["nll_per_token"] = math.nan
    (line,) = row_dicts(rows([row]))
    assert line["nll_per_token"] is None and "finite" in line["missing"]["nll_per_token"]


def test_a_row_whose_nats_are_not_finite_is_not_ranked(found: list[Row]) -> None:
    broken = record("broken")
    broken.samples["nll"] = [math.nan] * WINDOWS
    broken.values["nll_per_token"] = broken.values["perplexity"] = math.nan
    dense, row = rows([found[0].record, broken])
    assert row.values["nll_difference"] is None and row.values.get("quality_rank") is None
    assert dense.values["quality_rank"] == 1
    lines = json.loads(json.dumps(row_dicts([dense, row]), allow_nan=False))
    assert "finite" in lines[1]["missing"]["nll_difference"]


def test_what_applying_took_on_a_gpu_is_a_column_and_missing_energy_says_why(found: list[Row]) -> None:
    row = record("any")
    row.cost = {"seconds": 1.0, "peak_device_bytes": 77.0, "joules": None}
    row.missing["cost_joules"] = "rows are applied side by side"
    row = rows([row])[0]
    assert row.values["cost_peak_device_bytes"] == 77
    assert row.missing["cost_joules"] == "rows are applied side by side"


def test_a_suite_that_was_renamed_keeps_its_dense_row(found: list[Row]) -> None:
    later = record("rtn:bits=3", nats=0.1)
    later.suite = "another name"
    assert rows([found[0].record, later])[1].values["nll_difference"] == pytest.approx(0.1, abs=0.02)


def test_a_column_stands_once_in_the_frame(found: list[Row]) -> None:
    found[0].values |= {column.name: 1.0 for column in COLUMNS}
    names = column_names(found)
    assert len(names) == len(set(names)) and {column.name for column in COLUMNS} <= set(names)


def test_every_missing_value_of_the_frame_has_a_reason(folder: Path) -> None:
    table = effbench.read(folder)
    assert list(table["pipeline"])[0] == "dense" and len(table) == 7
    assert table["nll_difference"].dtype == float and table["joules_per_token"].isna().all()
    for _, line in table.iterrows():
        for name in table.columns:
            if name not in ("reason", "missing") and (line[name] is None or line[name] != line[name]):
                assert line["missing"][name], (line["pipeline"], name)


def test_reading_names_a_file_cut_in_half_and_keeps_the_others(folder: Path) -> None:
    path = next((folder / "records").glob("bitnet*"))
    path.write_text(path.read_text()[:100])
    with pytest.warns(UserWarning, match="bitnet.*not a whole record"):
        assert len(effbench.read(folder)) == 6


@pytest.mark.parametrize("width", [60, 80, 120, 140, 200])
def test_the_table_stays_within_its_width(found: list[Row], width: int) -> None:
    text = drawn(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert "Δnats" in text and re.search(r"\+0\.0[23]\d\d ±0\.000\d", text)
    assert all(part in text for part in STACK.split("+"))


def test_rows_without_figures_show_their_reason_across(found: list[Row]) -> None:
    text = drawn(found, 120)
    assert "unfit: magnitude: no plain weight matrix is left to compress" in text
    assert "applying failed: RuntimeError: shapes do not match" in text
    assert "failed: applying failed" not in text


def test_every_dash_of_the_table_has_its_reason_below(found: list[Row]) -> None:
    text = drawn(found, 200)
    assert "–" in text
    assert "– bits/w: no weight matrix was changed (dense, sink_window:window=124)" in text
    assert "J/token – no energy counter on this machine (no RAPL)" in text


def test_a_simulated_row_says_so_and_columns_left_out_are_named(found: list[Row]) -> None:
    text = drawn(found, 80)
    assert re.search(r"magnitude:sparsity=0\.5.*\n? *simulated", text)
    assert re.search(r"left out for lack of width:.*KV/token", text, re.S)


def test_an_interrupted_row_is_shown_as_unfinished() -> None:
    assert "not finished" in drawn(rows([record("dense"), ended("rtn:bits=4", "running", "")]), 100)


def test_markdown_is_a_table_of_equal_rows(found: list[Row]) -> None:
    lines = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(found)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(found: list[Row]) -> None:
    text = page([*found, *rows([ended("<script>alert(1)</script>", "failed", "<b> & 'quotes'")])])
    assert "<script>alert(1)" not in text and "&lt;script&gt;" in text and "&lt;b&gt; &amp;" in text
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", text)
    assert text.count("<tr") == len(found) + 2 and "$" not in text


def test_the_chart_marks_every_row_that_has_both_figures(found: list[Row]) -> None:
    image = ElementTree.fromstring(chart.scatter(found))
    marks = image.findall("g")
    assert len(marks) == 5 and sum(mark.get("class") == "dense" for mark in marks) == 1
    places = {
        mark.findtext("title", "").partition(": ")[0]: mark.find("circle").attrib  # type: ignore[union-attr]
        for mark in marks
    }
    dense = next(places[name] for name in places if name.startswith("dense"))
    rtn = next(spot for name, spot in places.items() if name.startswith("rtn") and "+" not in name)
    assert float(rtn["cx"]) < float(dense["cx"]), "fewer bytes lie to the left"
    assert float(rtn["cy"]) < float(dense["cy"]), "a loss lies above"


def test_no_chart_is_drawn_of_rows_without_figures() -> None:
    assert chart.scatter(rows([ended("bitnet", "failed", "x")])) == ""


def test_plain_progress_prints_one_line_for_each_row(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    progress = PlainProgress(console)
    progress.start(6, tmp_path)
    progress.step("dense: apply")
    progress.row(record("dense"))
    progress.row(ended("bitnet", "unfit", "it has no room for a reason as long as this one on a narrow page"))
    progress.stop()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2 and lines[0].startswith("dense  ppl ") and lines[1].endswith("narrow page")
    assert progress.out == tmp_path


def test_the_bar_shows_the_step_and_can_be_stopped_twice(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    progress = BarProgress(console)
    progress.start(2, tmp_path)
    progress.step("dense: apply")
    progress.row(record("dense"))
    progress.stop()
    progress.stop()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/2" in text and "dense: apply" in text and "left" in text


def test_importing_effbench_imports_nothing_heavy() -> None:
    code = "import effbench, sys; print([m for m in ('torch', 'pandas', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_json_of_a_report_is_strict(found: list[Row]) -> None:
    assert json.loads(json.dumps(row_dicts(found), allow_nan=False))[1]["simulated"] is False
