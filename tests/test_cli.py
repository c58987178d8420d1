"""The command line: quick, plain where nobody watches, one sentence and the right exit code for whatever is wrong."""

import csv
import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_records import record, write

import effbench
from effbench import cli, harness
from effbench.errors import UnfitError, UsageError
from effbench.options import spread
from effbench.suite import Suite, ask

MARKUP = "\x1b["
APPLY = ["apply", "ref-70k", "rtn", "--save", "there", "--device", "cpu"]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write(tmp_path / "run")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Suite, Path | None]]:
    """Runs that are asked for are noted and answered with a folder of records."""
    noted: list[tuple[Suite, Path | None]] = []

    def run(suite: Suite, out: Path | None = None, progress: Any = None) -> Path:
        noted.append((suite, out))
        return write(tmp_path / "measured")

    monkeypatch.setattr(harness, "run", run)
    return noted


def fails(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The sentence on stderr of a command that must fail without printing anything else."""
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("effbench: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["--version"], ["list", "--json"], ["list", "models"]]
)
def test_help_and_lists_start_without_the_heavy_packages(words: list[str]) -> None:
    code = (
        "import sys; from effbench.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'pandas', 'scipy', 'numpy', 'lm_eval') if m in sys.modules], "
        "file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run m --techniques a b c --limit 3", "run m --techniques a --techniques b --techniques c --limit 3"),
        ("run --techniques a --techniques b", "run --techniques a --techniques b"),
        ("run --techniques=a b -h", "run --techniques=a --techniques b -h"),
        ("run m --tasks a b", "run m --tasks a b"),
        ("run --techniques", "run --techniques"),
    ],
)
def test_several_pipelines_may_follow_one_flag(words: str, expected: str) -> None:
    assert spread(words.split()) == expected.split()


def test_run_passes_on_what_was_asked_and_prints_the_table(
    asked: list[tuple[Suite, Path | None]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = "run ref-70k --techniques rtn:bits=4 magnitude+rtn --tasks ref_copying,ref_retrieval --limit 7 --timeout 60"
    page = tmp_path / "page.html"
    assert cli.main([*words.split(), "--html", str(page), "--techniques", "svd draft", "--out", "here"]) == 0
    (suite, out), text = asked[0], capsys.readouterr().out
    assert suite.model == "ref-70k" and suite.techniques == ("rtn:bits=4", "magnitude+rtn", "svd", "draft")
    assert suite.tasks == ("ref_copying", "ref_retrieval") and suite.limit == 7 and suite.timeout_seconds == 60
    assert suite.name == "custom" and suite.dtype == "bfloat16" and out == Path("here")
    assert "Δnats" in text and f"effbench show {tmp_path / 'measured'}" in text and MARKUP not in text
    assert page.read_text().startswith("<!doctype html>")


def test_run_without_techniques_is_the_default_suite(asked: list[tuple[Suite, Path | None]]) -> None:
    assert cli.main(["run"]) == 0
    assert cli.main(["run", "some/model", "--seed", "3"]) == 0
    assert asked[0][0].name == "reference" and len(asked[0][0].techniques) > 5 and asked[0][0].model == "ref-1m"
    assert asked[1][0].model == "some/model" and asked[1][0].techniques == asked[0][0].techniques
    assert asked[1][0].seed == 3


def test_the_python_door_asks_the_same_and_gives_a_frame(
    asked: list[tuple[Suite, Path | None]], tmp_path: Path
) -> None:
    table = effbench.run("ref-1m", ["rtn:bits=4", "wanda+rtn"], limit=5, text=Path("a.txt"), out=tmp_path)
    assert isinstance(table, pd.DataFrame) and list(table["pipeline"])[0] == "dense"
    suite, out = asked[0]
    assert suite.techniques == ("rtn:bits=4", "wanda+rtn") and suite.limit == 5 and suite.text == "a.txt"
    assert out == tmp_path
    effbench.run(techniques="svd")
    assert asked[1][0].techniques == ("svd",) and asked[1][0].model == "ref-1m"
    with pytest.raises(UsageError, match="no option 'limits'; did you mean 'limit'"):
        effbench.run("ref-1m", limits=5)


def test_counts_are_whole_numbers() -> None:
    for value in (1.5, "5", True):
        with pytest.raises(UsageError, match="limit must be a whole number"):
            ask(limit=value)


def test_a_suite_of_ones_own_keeps_what_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('model = "ref-300k"\nlimit = 9\ntechniques = ["svd"]\n')
    assert ask(suite=str(path)) == Suite("mine", "ref-300k", ("svd",), limit=9)
    assert ask("ref-1m", suite=str(path), limit=3) == Suite("mine", "ref-1m", ("svd",), limit=3)


def test_ctrl_c_names_the_folder_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(suite: Suite, out: Path | None, progress: Any) -> Path:
        progress.start(3, tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", run)
    assert str(tmp_path) in (said := fails(["run", "ref-1m"], capsys, 130)) and "the same command continues it" in said


def test_a_dense_model_that_cannot_be_measured_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(row: Any) -> Any:
        if row.pipeline == "dense":
            row.status, row.reason = "out_of_memory", "scoring ran out of memory"
        return row

    monkeypatch.setattr(harness, "run", lambda *_: write(tmp_path / "run", change=broken))
    assert cli.main(["run", "ref-1m"]) == 1
    assert "dense model could not be measured: scoring ran out of memory" in capsys.readouterr().err


def test_show_gives_the_same_rows_in_every_form(
    records: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["show", str(records), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert cli.main(["show", str(records), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["pipeline"] for row in rows] == [line["pipeline"] for line in lines] and len(rows) == 7
    assert float(lines[1]["stored_bytes"]) == rows[1]["stored_bytes"] == 700_000
    assert cli.main(["show", str(records), "--markdown", "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.count("\n| `") == 7 and (tmp_path / "page.html").is_file()
    assert cli.main(["show", str(records)]) == 0
    assert "rtn:bits=4" in capsys.readouterr().out


def test_show_names_a_record_cut_in_half_and_shows_the_others(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((records / "records").glob("magnitude*"))
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    assert cli.main(["show", str(records)]) == 2
    out, err = capsys.readouterr()
    assert "rtn:bits=4" in out and "magnitude:sparsity" not in out
    assert path.name in err and err.count("\n") == 1


def test_compare_ends_with_1_for_a_regression_and_0_for_noise(
    tmp_path: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = write(tmp_path / "same", noise=5)
    assert cli.main(["compare", str(records), str(same)]) == 0
    assert "0 regressions" in capsys.readouterr().out

    def doubled(row: Any) -> Any:
        return (
            record(row.pipeline, nats=0.03, stored=1_400_000, bits=9, promised=4)
            if row.pipeline == "rtn:bits=4"
            else row
        )

    assert cli.main(["compare", str(records), str(write(tmp_path / "worse", change=doubled))]) == 1
    assert "regression: rtn:bits=4: stored_bytes rose from 700 kB to 1.40 MB" in capsys.readouterr().out


def test_apply_hands_everything_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(harness, "apply_and_save", lambda *words, **options: given.update(options, words=words))
    assert cli.main([*APPLY, "--dtype", "float32", "--seed", "4", "--allow-pickle"]) == 0
    assert given["words"] == ("ref-70k", "rtn", Path("there")) and given["device"] == "cpu" and given["seed"] == 4
    assert given["dtype"] == "float32" and given["trust"].pickle and not given["trust"].remote_code
    assert "effbench run there" in capsys.readouterr().out


def test_a_pipeline_that_does_not_fit_ends_apply_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unfit(*_: Any, **__: Any) -> None:
        raise UnfitError("rtn: no matrix is left")

    monkeypatch.setattr(harness, "apply_and_save", unfit)
    assert fails(APPLY, capsys, 1) == "effbench: rtn: no matrix is left\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run ref-1m --techniques rtm", "no technique 'rtm'; did you mean 'rtn'?"),
        ("run ref-1m --techniques magnitude:sparsty=0.5", "no option 'sparsty'; did you mean 'sparsity'?"),
        ("run ref-1m --techniques magnitude:sparsity=3", "must be strictly between 0 and 1, got 3"),
        ("run ref-1m --techniques magnitude:sparsity=few", "must be a number, got 'few'"),
        ("run ref-1m --techniques magnitude:", "is malformed near 'magnitude:'"),
        ("run ref-1m --techniques +", "is malformed"),
        ("run ref-1n", "no model 'ref-1n'; did you mean"),
        ("run /no/such/folder", "no model '/no/such/folder'"),
        ("run --suite nosuch", "no suite 'nosuch'"),
        ("run --limit 0", "limit must be at least 1, got 0"),
        ("run --threads 0", "threads must be at least 1, got 0"),
        ("run --new-tokens 1", "new_tokens must be at least 2"),
        ("run --limit few", "Invalid value for '--limit'"),
        ("run --device tpu", "Invalid value for '--device'"),
        ("run --techniqes rtn", "No such option: --techniqes"),
        ("run --text nowhere.txt ref-70k", "no text file nowhere.txt"),
        ("run ref-70k --dtype float16 --device cpu", "float16 on a CPU"),
        ("apply ref-70k", "Missing"),
        ("show nowhere", "nowhere holds no records"),
        ("show nowhere --json --csv", "exclude each other"),
        ("compare nowhere either", "nowhere holds no records"),
        ("compare nowhere either --nats -1", "nats must be at least 0, got -1"),
        ("check nosuch", "no technique 'nosuch'"),
        ("list flowers", "'flowers' is not one of"),
        ("frobnicate", "No such command 'frobnicate'"),
    ],
)
def test_a_wrong_question_gets_one_sentence_and_exit_code_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fails(words.split(), capsys)


def _no_config(folder: Path) -> None:
    (folder / "README.md").write_text("nothing here")


def _no_weights(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _pickled(folder: Path) -> None:
    _no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _cut_short(folder: Path) -> None:
    _no_weights(folder)
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 7)


def _garbage(folder: Path) -> None:
    _no_weights(folder)
    (folder / "model.safetensors").write_bytes(b"no header at all")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_no_config, "has no config.json"),
        (_no_weights, "has no weights"),
        (_pickled, "--allow-pickle"),
        (_cut_short, "is cut short"),
        (_garbage, "corrupt"),
    ],
)
def test_a_folder_that_is_no_good_model_gets_one_sentence(
    make: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "model").mkdir()
    make(folder)
    words = ["run", str(folder), "--techniques", "magnitude", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert said in fails(words, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", '{"text": "  "}\n', "is empty"),
        ("odd.jsonl", '{"body": "x"}\n', 'must have a JSON object with a "text" in each line'),
        ("page.pdf", "x", "text must be a .txt file"),
    ],
)
def test_a_text_that_says_nothing_gets_one_sentence(
    name: str, content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    words = ["run", "ref-70k", "--techniques", "magnitude", "--device", "cpu", "--text", str(tmp_path / name)]
    assert said in fails(words, capsys)


def test_an_unknown_task_gets_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "ref-70k", "--techniques", "magnitude", "--device", "cpu", "--tasks", "ref_copyng"]
    assert "did you mean 'ref_copying'?" in fails([*words, "--out", str(tmp_path / "out")], capsys)


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["run", "ref-70k", "--techniques", "magnitude", "--device", "cpu", "--out", str(tmp_path / "file" / "out")]
    assert "choose another folder with --out" in fails(words, capsys)
    assert "another file with --html" in fails_after_output(["show", str(records), "--html", str(tmp_path)], capsys)


def fails_after_output(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a command that had something to show before it failed."""
    assert cli.main(words) == 2
    return capsys.readouterr().err


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert "compare" in out + err and "effbench: " not in err


def test_the_doctor_tells_what_it_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**28
    assert found["kernels"]["bfloat16 product"] == "works"
    assert "cpu" in found["energy"] and "cpu" in found["devices"]
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "kernels" in text and "energy" in text and MARKUP not in text


def test_a_kernel_that_is_not_there_is_reported_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from effbench.measure import host

    def broken(*_: Any) -> None:
        raise RuntimeError("not compiled in\nand more")

    monkeypatch.setattr(torch, "_int_mm", broken)
    assert host.survey()["kernels"]["int8 weights and activations"] == "not compiled in"


def test_lists_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for kind in ("techniques", "tasks", "models", "suites"):
        assert cli.main(["list", kind, "--json"]) == 0
        found[kind] = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
        assert cli.main(["list", kind]) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in found[kind]) and MARKUP not in text
    assert found["techniques"]["magnitude"]["family"] == "pruning" and found["techniques"]["magnitude"]["summary"]
    assert "ref_copying" in found["tasks"] and "ref-1m" in found["models"] and "reference" in found["suites"]
