"""The page of pruning and low rank: its suites ask for what it shows, and rows of other weights are not mixed in."""

from pathlib import Path

from synthetic_records import record

from effbench import registry, results, suite
from effbench.evidence import FOLDER, PRUNING, pruning
from effbench.evidence.measure import measure
from effbench.evidence.page import PAGES, page
from effbench.evidence.rows import Rows


def test_the_suites_ask_what_the_page_shows_and_nothing_twice() -> None:
    shown = {pipeline for ordering in (*pruning.ASKED, *pruning.OTHERS) for pipeline in ordering[:2]}
    for name in pruning.MODELS:
        asked = set(suite.load(str(PRUNING / name / "suite.toml")).techniques)
        elsewhere = FOLDER / name / "suite.toml"
        known = set(suite.load(str(elsewhere)).techniques) if elsewhere.is_file() else set()
        assert shown <= asked | known and not asked & known and asked <= shown
        assert all(registry.canonical(pipeline) == pipeline for pipeline in asked)


def rows_of(folder: Path, weights: str, *pipelines: str) -> Rows:
    for pipeline in pipelines:
        row = record(pipeline)
        row.provenance["inputs"] = {"weights": weights}
        results.save(row, folder / "ref-1m")
    return Rows.of(folder, "ref-1m")


def test_rows_of_another_folder_are_added_where_they_are_of_the_same_weights(tmp_path: Path) -> None:
    own = rows_of(tmp_path / "own", "a", "dense", "wanda")
    same = rows_of(tmp_path / "same", "a", "dense", "wanda", "svd")
    other = rows_of(tmp_path / "other", "b", "dense", "svd")
    assert own.joined(same).records.keys() == {"dense", "wanda", "svd"}
    assert own.joined(same).get("wanda") is own.get("wanda")
    assert own.joined(other).records.keys() == {"dense", "wanda"}
    nothing = Rows.of(tmp_path / "nothing", "ref-1m")
    assert own.joined(nothing) is own and nothing.joined(same) is same


def test_a_page_without_rows_says_that_nothing_is_measured_yet(tmp_path: Path) -> None:
    text = page(tmp_path, PAGES[PRUNING])
    assert text.startswith("# What pruning and low rank show\n\n`make pruning` measures")


def test_a_suite_whose_model_is_not_here_keeps_its_rows(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "suite.toml").write_text('model = "./no/such/model"\ntechniques = ["rtn"]\n')
    kept = results.save(record("dense"), tmp_path / "away").read_text()
    measure(tmp_path)
    assert (tmp_path / "away" / "records" / "dense--seed0.json").read_text() == kept
