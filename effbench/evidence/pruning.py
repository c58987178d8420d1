"""What is asked of pruning and low rank, on two models of the reference family and on one of real stories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effbench import harness, suite
from effbench.evidence import FOLDER, crossovers, fisher, input_norms, wide
from effbench.evidence.measure import answerable
from effbench.evidence.orderings import Ordering, of_rows
from effbench.evidence.rows import Rows
from effbench.evidence.table import Table

MODELS = ("ref-1m", "ref-3m", "stories")
"""By the folder of the suite; what the reference family's own page has of a model is not measured twice."""

PRUNED = "llm_pruner:sparsity=0.2"

ASKED: Sequence[Ordering] = (
    ("sparsegpt:compare=row", "wanda:sparsity=0.5", 1),
    ("sparsegpt", "wanda:compare=matrix", 1),
    ("magnitude:sparsity=0.5", "random:sparsity=0.5", 1),
    ("sparsegpt", "sparsegpt:pattern=2:4", 1),
    ("wanda:sparsity=0.5", "wanda:pattern=2:4", 1),
    ("magnitude:sparsity=0.5", "magnitude:pattern=2:4", 1),
    ("svd_llm:keep=0.8", "asvd:keep=0.8", 1),
    ("svd_llm:keep=0.6", "asvd:keep=0.6", 1),
    ("fwsvd:keep=0.8", "svd:keep=0.8", 1),
    ("fwsvd:keep=0.6", "svd:keep=0.6", 1),
    (f"{PRUNED}+recover", PRUNED, 2),
)
OTHERS: Sequence[Ordering] = (
    ("wanda:compare=matrix", "magnitude:sparsity=0.5", 1),
    ("wanda:sparsity=0.5", "magnitude:sparsity=0.5,compare=row", 1),
    ("wanda:sparsity=0.5", "magnitude:sparsity=0.5", 1),
    ("sparsegpt:pattern=2:4", "wanda:pattern=2:4", 1),
    ("wanda:pattern=2:4", "magnitude:pattern=2:4", 1),
)
"""Not asked, but what a reader of the papers would expect."""

NOTES = (
    "Δnats: per token above dense, ± one standard error, paired over the same windows; ref-1m, ref-3m: 256 windows of "
    "511 tokens of the synthetic world; stories: TinyStories-656K on stories of its own training text, a story a "
    "window, calibrated and trained on stories that it told itself (arXiv:2410.17170)",
    "50 % sparsity unless a name says another; with `compare=row` weights compete within a row, with `compare=matrix` "
    "within a matrix (SparseGPT: within each block of its columns), and of the two only equals are compared",
    "2x: what is trained on wins back at least half of what pruning lost",
)
EXPECTED = (
    "`wanda:sparsity=0.5` compares within rows, `magnitude:sparsity=0.5` over a matrix, each as its released code does",
)


def tables(folder: Path) -> list[Table]:
    """All of them, in the page's order."""
    rows = [Rows.of(folder, name).joined(Rows.of(FOLDER, name)) for name in MODELS]
    return [
        of_rows([(found, ASKED) for found in rows], NOTES),
        of_rows([(found, OTHERS) for found in rows], EXPECTED, "Orderings that papers lead one to expect"),
        fisher.table(folder, MODELS),
        input_norms.table(folder, MODELS),
        wide.table(folder),
        crossovers.table(folder),
    ]


def measure(folder: Path) -> None:
    """What is no row of a suite, unless it is there already: experiments, and times on wide matrices."""
    for name in MODELS:
        asked = harness.resolve(suite.load(str(folder / name / "suite.toml")))
        if answerable(asked):
            for experiment in (fisher.EXPERIMENT, input_norms.EXPERIMENT):
                experiment.measure(folder / name, asked)
    wide.measure(folder)
    crossovers.measure(folder)
