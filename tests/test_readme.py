"""What the README promises a newcomer."""

import importlib.util
import re
import sys
from pathlib import Path

from effbench import contract
from effbench.report import docs
from effbench.technique import Technique

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_technique_shown_is_short_and_keeps_the_contract(tmp_path: Path) -> None:
    code = re.search(r"### Add one.*?```python\n(.*?)```", README, re.DOTALL)
    assert code and len(code[1].splitlines()) < 25
    path = tmp_path / "sign.py"
    path.write_text(code[1])
    spec = importlib.util.spec_from_file_location("sign", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sign"] = module
    spec.loader.exec_module(module)
    technique: Technique = module.Sign()
    results = contract.check(technique, "quantization")
    assert contract.passed(results), results


def test_generated_text_is_up_to_date() -> None:
    for path, text in docs.documents().items():
        assert path.read_text() == text, f"{path.name} is out of date; run python -m effbench.report.docs"


def test_every_command_shown_exists() -> None:
    from typer.main import get_command

    from effbench.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"effbench (run|apply|list|show|compare|check|doctor)\b", README))
    assert shown <= known and len(shown) == 7
