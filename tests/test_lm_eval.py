"""lm-eval's own command line with our systems as its models."""

import json
from pathlib import Path

import pytest
from test_tasks import ANSWERED, write

from effbench import cli, harness, lm_eval_model
from effbench.errors import UsageError
from effbench.lm_eval_model import EffbenchLM
from effbench.measure import accuracy, tasks
from effbench.suite import Suite


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval indexes its thousands of tasks, which takes seconds: here only those with items below."""
    import lm_eval.tasks

    few = lm_eval.tasks.TaskManager(
        include_path=[str(tasks.REFERENCE), str(tasks._root() / "piqa")], include_defaults=False
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: few)


def test_its_figures_are_those_of_the_same_system(
    indexed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model",
        "effbench",
        "--model_args",
        "pretrained=ref-70k,techniques=rtn:bits=3,group_size=16,dtype=float32",
    ]
    words += ["--tasks", "ref_agreement", "--limit", "12", "--output_path", str(tmp_path), "--device", "cpu"]
    assert cli.main(["lm-eval", *words]) == 0
    assert "ref_agreement" in capsys.readouterr().out
    found = json.loads(next(tmp_path.rglob("results*.json")).read_text())["results"]["ref_agreement"]["acc,none"]
    suite = Suite(model="ref-70k", dtype="float32", device="cpu")
    system = harness.applied(suite, "rtn:bits=3,group_size=16")
    assert found == accuracy.evaluate(system, ["ref_agreement"], limit=12)["ref_agreement"].accuracy
    assert (
        found
        != accuracy.evaluate(harness.applied(suite, "dense"), ["ref_agreement"], limit=12)["ref_agreement"].accuracy
    )


def test_items_come_from_a_folder(indexed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "piqa.jsonl", ANSWERED["piqa"])
    words = ["run", "--model", "dummy", "--tasks", "piqa", f"--task_data={tmp_path}", "--device", "cpu"]
    assert cli.main(["lm-eval", *words]) == 0
    assert "piqa" in capsys.readouterr().out


def test_what_it_does_not_know_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no option 'bits' .it has: pretrained"):
        EffbenchLM("ref-70k", bits=4)
    with pytest.raises(UsageError, match="did you mean 'rtn'"):
        EffbenchLM("ref-70k", "rtm", device="cpu")
    assert cli.main(["lm-eval", "--tasks", "piqa", "--task_data"]) == 2
    assert "needs a folder" in capsys.readouterr().err


def test_commas_that_lm_eval_took_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def stop(suite: Suite, pipeline: str, trust: object) -> None:
        raise Asked(pipeline)

    monkeypatch.setattr(lm_eval_model.harness, "applied", stop)
    with pytest.raises(Asked, match=r"^gptq:bits=4,act_order=true,block_size=64\+kivi:bits=2$"):
        EffbenchLM("ref-70k", "gptq:bits=4", act_order=True, block_size="64+kivi:bits=2")
