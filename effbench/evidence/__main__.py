"""Measure what is missing of the evidence, and write its page: `python -m effbench.evidence [FOLDER]`."""

import sys
from pathlib import Path

from rich.console import Console

from effbench.errors import EffbenchError
from effbench.evidence import FOLDER
from effbench.evidence.measure import measure
from effbench.evidence.page import PAGES, page
from effbench.report.progress import progress_for


def main() -> int:
    """Measure and write; the exit code."""
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else FOLDER
    shown = PAGES.get(folder, PAGES[FOLDER])
    progress = progress_for(Console(stderr=True))
    try:
        measure(folder, progress)
        if shown.measure is not None:
            shown.measure(folder)
    except EffbenchError as error:
        print(f"effbench: {error}", file=sys.stderr)
        return 2
    finally:
        progress.stop()
    (folder / "README.md").write_text(page(folder, shown), encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
