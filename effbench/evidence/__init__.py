"""What the reference family shows: tables of claims about it, each beside the figures that bear it or do not.

    python -m effbench.evidence       measures what is missing: suites -> committed records, small ones -> the page
    python -m effbench.report.docs    makes the page anew from the committed records

Rows are ordinary ones, of `effbench.harness.run`. How the family was trained is read from its training records.
"""

from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "results" / "reference" / "evidence"
"""Suites with their records, the training records of what does not ship, and the page."""
