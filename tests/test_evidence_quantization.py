"""The page of quantization: its suites ask for what it shows, and its claims hold where the figures say so."""

import json
from pathlib import Path

import pytest
from synthetic_records import record

from effbench import harness, registry, results, suite
from effbench.evidence import FOLDER, QUANTIZATION, eight_bits, quantization, smoothing
from effbench.evidence.page import PAGES, page


def test_the_suites_ask_what_the_page_shows() -> None:
    for name in quantization.MODELS:
        shown = {pipeline for ordering in quantization.ASKED[name] for pipeline in ordering[:2]}
        shown |= set(
            quantization.ALPHAS if name.endswith("outliers") else (*quantization.EIGHT_BITS, quantization.BESIDE)
        )
        asked = set(suite.load(str(QUANTIZATION / name / "suite.toml")).techniques)
        elsewhere = FOLDER / name / "suite.toml"
        known = set(suite.load(str(elsewhere)).techniques) if elsewhere.is_file() else set()
        assert shown <= asked | known and asked <= shown
        assert all(registry.canonical(pipeline) == pipeline for pipeline in asked)


def test_a_page_without_rows_says_that_nothing_is_measured_yet(tmp_path: Path) -> None:
    assert page(tmp_path, PAGES[QUANTIZATION]).startswith("# What quantization shows\n\n`make quantization` measures")


@pytest.mark.parametrize("best", [2, 0])
def test_alphas_stand_beside_the_best_of_them(tmp_path: Path, best: int) -> None:
    folder = tmp_path / "ref-1m-outliers"
    results.save(record("dense"), folder)
    for place, pipeline in enumerate(quantization.ALPHAS):
        results.save(record(pipeline, nats=0.001 * (1 + abs(place - best))), folder)
    lines = quantization.tables(tmp_path)[3].lines
    assert lines[best].cells[2:] == ["–", "–"]
    assert all(float(line.cells[3]) > 3 for place, line in enumerate(lines) if place != best)


def test_more_is_moved_into_weights_until_they_err_more_than_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "ref-1m-outliers"
    folder.mkdir()
    asked = harness.resolve(suite.Suite(model="ref-70k@outliers", tasks=["ref_agreement"], techniques=["rtn"]))
    smoothing.measure(folder, asked)
    known = json.loads((folder / smoothing.RECORD).read_text())
    assert known["inputs"].keys() == {"weights", "texts"} and known["weights"]["1"] > known["weights"]["0.5"]
    assert all(known[kind].keys() == known["both"].keys() for kind in smoothing.ROUNDED)
    assert known["both"]["0"] > 1.3 * known["both"]["0.5"]
    for alpha, both in known["both"].items():  # two errors that know nothing of each other
        assert both == pytest.approx(known["weights"][alpha] + known["activations"][alpha], rel=0.2)
    table = smoothing.table(tmp_path, "ref-1m-outliers")
    assert table.claims == [True, True] and table.lines[0].cells[0] == "0"


def test_each_kind_of_matrix_is_rounded_by_itself_and_put_back(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    asked = harness.resolve(suite.Suite(model="ref-70k", tasks=["ref_agreement"], techniques=["rtn"]))
    eight_bits.measure(tmp_path / "stories", asked, 2)
    known = json.loads((tmp_path / "stories" / eight_bits.RECORD).read_text())
    lines = eight_bits.table(tmp_path, "stories").lines
    assert [line.cells[0] for line in lines][-1] == eight_bits.TOGETHER and len(lines) == 8
    rows = [row for name, row in known.items() if name not in ("inputs", "tokens", "dense")]
    assert all(row != known["dense"] and sum(row) == pytest.approx(sum(known["dense"]), rel=0.02) for row in rows)
