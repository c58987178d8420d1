"""Architectures by techniques: each once by default, all pairs if asked, and the committed page is what they give."""

from pathlib import Path

import pytest

from effbench import registry
from effbench.coverage import ARCHITECTURES, Cell, Lab, diagonal, matrix, page, read

PAGE = Path(__file__).parent.parent / "results" / "architectures"
PAIRS = diagonal()


def test_the_diagonal_has_every_architecture_and_every_technique() -> None:
    assert set(PAIRS) == set(ARCHITECTURES) and all(PAIRS.values())
    assert {name for names in PAIRS.values() for name in names} == set(registry.names())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_works_with_techniques_or_says_why_not(architecture: str, tmp_path: Path) -> None:
    lab = Lab(architecture, tmp_path / "model")
    for technique in PAIRS[architecture]:
        cell = lab.try_out(technique)
        assert not cell.problem, f"{technique}: {cell.problem}"
        assert cell.reason or cell.share is None or cell.share > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_committed_cells_are_what_all_techniques_give(architecture: str) -> None:
    committed = {cell.technique: cell for cell in read(PAGE) if cell.architecture == architecture}
    for cell in matrix([architecture]):
        assert not cell.problem, cell
        there = committed[cell.technique]
        if "is not installed" in cell.reason:
            continue
        assert bool(cell.reason) == bool(there.reason), cell
        if cell.technique in ("fold", "shortgpt"):  # which of two random blocks matters less turns on rounding
            assert cell.share is None or cell.share > 0.4
        else:  # and so does which experts a calibration token is sent to
            assert cell.share == pytest.approx(there.share, abs=0.15)


def test_the_committed_page_is_made_of_the_committed_cells() -> None:
    cells = read(PAGE)
    assert (PAGE / "README.md").read_text("utf-8") == page(cells) and not any(cell.problem for cell in cells)


def test_a_cell_shows_its_share_and_a_reason_is_told_once() -> None:
    why = "it has *no* matrices"
    cells = [
        Cell("llama", "rtn", share=0.5),
        Cell("llama", "draft"),
        Cell("mamba", "rtn", reason=why),
        Cell("opt", "rtn", reason=why),
        Cell("opt", "draft", problem="ValueError: x"),
    ]
    lines = page(cells).splitlines()
    assert "| `rtn` | 50 | (1) | (1) |" in lines
    assert "| `draft` | ok |  | **fails** (2) |" in lines
    assert "1. `rtn`: it has \\*no\\* matrices (mamba, opt)" in lines
