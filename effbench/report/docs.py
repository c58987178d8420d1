"""Text that is generated and committed: the leaderboards in results/ and the blocks of the README.

python -m effbench.report.docs            writes it
python -m effbench.report.docs --check    says what is out of date, and exits with 1 if anything is
"""

from __future__ import annotations

import sys
from pathlib import Path

from effbench import registry, results
from effbench.columns import COLUMNS
from effbench.evidence.page import PAGES, page
from effbench.measure.derived import rows
from effbench.report import gpu, machine
from effbench.report.markdown import markdown
from effbench.report.table import VIEWS

ROOT = Path(__file__).parent.parent.parent
README_VIEWS = (
    "perplexity",
    "nll_difference",
    "accuracy",
    "decode_speedup",
    "stored_bytes",
    "bits_per_weight",
    "cache_bytes_per_token",
)
"""The columns of the README's table; the leaderboard it links to has all of them."""


def documents(root: Path = ROOT) -> dict[Path, str]:
    """What every generated file should say."""
    texts = {}
    for suite in sorted((root / "results").glob("*/suite.toml")):
        if (suite.parent / "records").is_dir():
            records, _ = results.load_all(suite.parent)
            texts[suite.parent / "README.md"] = f"# {suite.parent.name}\n\n{markdown(rows(records))}"
    for folder, shown in PAGES.items():
        texts[root / folder.relative_to(ROOT) / "README.md"] = page(root / folder.relative_to(ROOT), shown)
    if (root / machine.FOLDER / "limits.json").is_file():
        texts[root / machine.FOLDER / "README.md"] = machine.page(root / machine.FOLDER)
    for measured in sorted((root / "results").glob("*/products.json")):
        texts[measured.parent / "README.md"] = gpu.page(measured.parent)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, content in blocks(root).items():
        head, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, tail = rest.partition(f"<!-- end {name} -->")
        text = head + begin + content + end + tail
    texts[readme] = text
    return texts


def blocks(root: Path = ROOT) -> dict[str, str]:
    """The README's generated blocks, by name."""
    own = [entry for entry in registry.entries().values() if entry.path is not None]  # not what else is installed here
    listed = ["| technique | family | what it does |", "|---|---|---|"]
    listed += [f"| `{e.name}` | {e.family.replace('_', ' ')} | {_escaped(_first_sentence(e.summary))} |" for e in own]
    columns = ["| column | unit | better | how it is measured |", "|---|---|---|---|"]
    columns += [f"| `{c.name}` | {c.unit} | {c.better} | {_escaped(c.meaning)} |" for c in COLUMNS]
    made = {"techniques": "\n".join(listed) + "\n", "columns": "\n".join(columns) + "\n"}
    if (root / "results" / "reference" / "records").is_dir():
        records, _ = results.load_all(root / "results" / "reference")
        made["table"] = markdown(rows(records), [view for view in VIEWS if view.name in README_VIEWS])
    return made


def _first_sentence(summary: str) -> str:
    return summary.partition(". ")[0].rstrip(".")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write or check; the exit code."""
    stale = [path for path, text in documents().items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run python -m effbench.report.docs", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(documents()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
