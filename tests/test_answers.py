"""What a system answered is found by content: only what is new is run, and nothing of another system is taken."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from effbench import results
from effbench.jobs import applying, scoring
from effbench.measure import answers
from effbench.measure.answers import Answers, beside, system_name
from effbench.measure.encoding import Choices
from effbench.measure.likelihood import Likelihoods
from effbench.results import Record
from effbench.suite import Suite

PAIRS = [([1, 2, 3], [4]), ([1, 2, 3], [5, 6]), ([7], [4]), ([1, 2, 3], [4]), ([1, 2], [3, 4])]


class Answering:
    """Gives each choice a number that is its own, and keeps how many it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(len(choices.lengths))
        starts = zip(choices.context_of, choices.starts, choices.lengths, strict=True)
        said = [
            (choices.contexts[place].tolist(), choices.tokens[start : start + length].tolist())
            for place, start, length in starts
        ]
        values = np.array([float(hash(str(pair)) % 10**6) / 7 for pair in said])
        return values, values % 2 < 1


def test_only_new_choices_are_run_and_all_get_what_they_get_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "TOGETHER", 2)
    expected = Answering()(Choices.of(PAIRS))
    answer = Answering()
    known = Answers(tmp_path / "one" / "answers" / "s.npz")
    known.complete(Choices.of(PAIRS[1:3]), answer)
    found = known.complete(Choices.of(PAIRS), answer)
    assert answer.asked == [2, 2] and (known.asked, known.reused) == (7, 2)  # of the five, two are the same
    again = Answers(tmp_path / "two" / "answers" / "s.npz", beside(tmp_path / "two", "s"))
    nothing = Answering()
    for values, greedy in (found, again.complete(Choices.of(PAIRS), nothing)):
        assert np.array_equal(values, expected[0]) and np.array_equal(greedy, expected[1])
    assert not nothing.asked and again.reused == 5 and not again.path.exists()
    assert not beside(tmp_path / "one", "s")  # its own is no other's


def test_a_file_cut_short_is_no_answer(tmp_path: Path) -> None:
    path, answer = tmp_path / "s.npz", Answering()
    Answers(path).complete(Choices.of(PAIRS), answer)
    path.write_bytes(path.read_bytes()[:200])
    Answers(path).complete(Choices.of(PAIRS), answer)
    assert answer.asked == [4, 4]


def test_a_system_is_known_by_every_byte_and_by_where_it_runs(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, content in (("effbench.json", "{}"), ("model/config.json", "{1}")):
        (tmp_path / name).write_text(content)
    names = {system_name(tmp_path, "cpu"), system_name(tmp_path, "cuda")}
    assert len(names) == 2 and system_name(tmp_path, "cpu") in names
    (tmp_path / "model/config.json").write_text("{2}")
    assert system_name(tmp_path, "cpu") not in names


def scored(out: Path, pipeline: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[Record, int]:
    """The row of a run in folder `out`, applied and scored, and how many choices its model was run on."""
    suite = Suite(**{"model": "ref-70k", "device": "cpu", "threads": 1, "limit": 4, "rounds": 1, **changes})
    ran = []
    plain = Likelihoods.answer
    with monkeypatch.context() as patched:
        patched.setattr(Likelihoods, "answer", lambda self, some: (ran.append(len(some.lengths)), plain(self, some))[1])
        for job in (applying.apply, scoring.quality):
            job(str(out), asdict(suite), pipeline, str(out / "systems" / pipeline.replace(":", "-")))
    record = results.load(results.path_of(Record("", "", pipeline, 0), out))
    return record, sum(ran)


def test_a_run_with_one_more_task_and_more_items_takes_answers_from_the_run_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, more = ("ref_copying",), ("ref_copying", "ref_agreement")
    for pipeline in ("dense", "rtn:bits=3"):
        first, ran = scored(tmp_path / "first", pipeline, monkeypatch, tasks=few)
        assert ran == first.provenance["answers"]["asked"] and not first.provenance["answers"]["reused"]
        second, then = scored(tmp_path / "second", pipeline, monkeypatch, tasks=more, limit=6)
        about = second.provenance["answers"]
        assert about["reused"] == ran and then == about["asked"] - ran > 0
        fresh, all_of_them = scored(tmp_path / "apart" / "third", pipeline, monkeypatch, tasks=more, limit=6)
        assert all_of_them == about["asked"]
        for task in more:
            assert second.samples[f"correct/{task}"] == fresh.samples[f"correct/{task}"]
        assert "known from an earlier run" in second.missing["joules_per_correct"]
