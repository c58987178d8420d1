"""Tables of claims beside the figures that bear them or do not: of the reference family, pruning, quantization.

    python -m effbench.evidence [FOLDER]    measures what is missing: suites -> committed, small records -> the page
    python -m effbench.report.docs          makes all pages anew from the committed records

Rows are ordinary ones, of `effbench.harness.run`. How the family was trained is read from its training records.
"""

from pathlib import Path

_RESULTS = Path(__file__).parent.parent.parent / "results"
FOLDER = _RESULTS / "reference" / "evidence"
"""Suites with their records, the training records of what does not ship, and the page."""
PRUNING = _RESULTS / "pruning"
"""The same of pruning and low rank."""
QUANTIZATION = _RESULTS / "quantization"
"""The same of quantization."""
