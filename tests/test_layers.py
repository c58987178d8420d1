"""The architecture: who may import whom, and how long a file may be."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"errors", "columns"},
    {"technique", "toolbox"},
    {
        "registry",
        "models",
        "mapped",
        "checkpoint",
        "store",
        "suite",
        "data",
        "protocols",
        "streams",
        "reference",
        "measure",
        "results",
    },
    {"worker", "jobs", "schedule", "harness", "report", "compare", "contract", "coverage", "evidence"},
    {"cli", "lm_eval_model", "noise", "options"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """The rooms of effbench that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "effbench":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effbench."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("effbench.")}
    return found


def test_each_room_imports_only_from_its_own_layer_or_from_those_below() -> None:
    wrong = []
    for path in (ROOT / "effbench").rglob("*.py"):
        room = path.relative_to(ROOT / "effbench").parts[0].removesuffix(".py")
        if room != "__init__":
            assert room in LEVEL, f"{room} stands in no layer; name it in LAYERS"
            wrong += [f"{path.name} imports {name}" for name in imports(path) if LEVEL.get(name, 0) > LEVEL[room]]
    assert not wrong


def test_a_technique_imports_only_the_protocol_the_toolbox_and_the_errors() -> None:
    wrong = []
    for path in (ROOT / "techniques").rglob("*.py"):
        wrong += [f"{path.name} imports {name}" for name in imports(path) - {"technique", "toolbox", "errors"}]
    assert not wrong


def test_measuring_knows_no_technique() -> None:
    for path in (ROOT / "effbench" / "measure").rglob("*.py"):
        assert "effbench.techniques" not in path.read_text()


def test_no_file_has_outgrown_its_room() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for folder in ("effbench", "techniques", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 300
    ]
    assert not long
