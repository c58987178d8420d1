"""The page of pruning and low rank: its suites ask for what it shows, and rows of other weights are not mixed in."""

import json
from pathlib import Path

from synthetic_records import record
from torch import nn

from effbench import harness, registry, results, suite
from effbench.evidence import FOLDER, PRUNING, crossovers, fisher, input_norms, proxies, pruning, wide
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


def test_time_holds_where_it_falls_as_the_weights_do(tmp_path: Path) -> None:
    shares = {"dense": 1.0, **{pipeline: 0.5 for pipeline in wide.PIPELINES}}
    times = {**shares, wide.PIPELINES[1]: 0.56, wide.PIPELINES[2]: 0.6}
    seconds = {
        name: {kind: [time * (1 + 0.1 * turn) for turn in range(wide.ROUNDS)] for kind in wide.TIMED}
        for name, time in times.items()
    }
    (tmp_path / wide.RECORD).write_text(json.dumps({"weights": shares, "seconds": seconds}))
    lines = wide.table(tmp_path).lines
    assert [line.holds for line in lines[:4]] == [True, True, False, True]
    assert lines[1].cells[2].startswith("0.560 [0.560") and lines[1].cells[3] == "1.12"


def test_weights_count_for_each_module_that_multiplies_with_them() -> None:
    one, other = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    other.weight = one.weight
    assert wide.multiplied(nn.Sequential(nn.Embedding(9, 8), one, other)) == 64


def test_a_sparse_product_is_bold_where_it_wins(tmp_path: Path) -> None:
    rows = {str(count): [1.0, 1.0, 1.0] for count in crossovers.ROWS}
    slow, fast = ({key: [by] * 3 for key in rows} for by in (4.0, 0.5))
    found = {
        str(s): {"dense": rows, "bitmask": slow, "csr": fast, "csr, filled in": slow} for s in crossovers.SPARSITIES
    }
    (tmp_path / crossovers.RECORD).write_text(json.dumps({"milliseconds": found}))
    cells = {tuple(line.cells[:2]): line.cells[2:] for line in crossovers.table(tmp_path).lines}
    assert set(cells["csr", "90 %"]) == {"**2.00**"} and set(cells["bitmask", "90 %"]) == {"0.25"}
    assert set(cells["2:4", "50 %"]) == {"–"} and set(cells["dense, ms", ""]) == {"1.00"}


def test_the_experiment_says_which_of_both_adds_less(tmp_path: Path) -> None:
    noise = [10.0 + 0.01 * place for place in range(8)]
    added = {"q_proj": (2, 1), "down_proj": (1, 3), proxies.TOGETHER: (5, 5)}
    rows = {
        f"{setting} {kind} {which}": {
            "measure": 1.0 if place else 4.0,
            "outputs": 3.0 if place else 2.0,
            "nats": [
                value + both[place] + 1e-3 * (-1) ** (turn + both[0] * (not place)) for turn, value in enumerate(noise)
            ],
        }
        for place, which in enumerate(("plain", "weighted"))
        for setting in fisher.EXPERIMENT.pairs
        for kind, both in added.items()
    }
    (tmp_path / "ref-1m").mkdir()
    known = {"tokens": [100] * 8, "dense": noise, "rows": rows}
    (tmp_path / "ref-1m" / fisher.EXPERIMENT.record).write_text(json.dumps(known))
    lines = fisher.table(tmp_path, ["ref-1m", "ref-3m"]).lines
    assert [line.cells[-1] for line in lines] == ["fwsvd", "svd", "neither"] * 2 + ["–"]
    assert lines[1].cells[2:6] == ["down_proj", "0.25", "1.50", "+0.0100 ±0.0000"]


def test_an_experiment_measures_each_kind_of_matrix_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    small = proxies.Experiment("found.json", {"2:4": input_norms.EXPERIMENT.pairs["2:4"]}, input_norms.squares)
    asked = harness.resolve(suite.Suite(model="ref-70k", tasks=["ref_agreement"], techniques=["rtn"]))
    small.measure(tmp_path, asked, windows=2, samples=2)
    path = tmp_path / small.record
    rows = json.loads(path.read_text())["rows"]
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", proxies.TOGETHER}
    assert rows.keys() == {f"2:4 {kind} {which}" for kind in kinds for which in ("plain", "weighted")}
    for kind in kinds:  # what it makes small is smaller, whatever becomes of the rest
        assert rows[f"2:4 {kind} weighted"]["measure"] < rows[f"2:4 {kind} plain"]["measure"]
    together = rows[f"2:4 {proxies.TOGETHER} plain"]["nats"]
    assert all(sum(together) > sum(row["nats"]) for name, row in rows.items() if proxies.TOGETHER not in name)
    written = path.stat().st_mtime_ns
    small.measure(tmp_path, asked, windows=2, samples=2)
    assert path.stat().st_mtime_ns == written
