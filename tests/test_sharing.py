"""What rows share: the tasks' questions are built once for each tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from conftest import random_system

from effbench.jobs import sharing
from effbench.measure import accuracy, questions
from effbench.suite import Suite

SUITE = Suite(model="ref-70k", tasks=("ref_copying", "ref_agreement"), limit=3)


def test_a_second_row_finds_the_questions_of_the_first_and_another_tokenizer_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing.folder(tmp_path).mkdir()
    system = random_system("llama")
    first = sharing.questions(tmp_path, SUITE, system)
    with monkeypatch.context() as patched:
        patched.setattr(questions, "build", lambda *_: pytest.fail("the questions were built again"))
        second = sharing.questions(tmp_path, SUITE, random_system("gpt2"))
    one, other = (accuracy.SystemLM(system).answer(asked.choices)[0] for asked in (first, second))
    assert np.array_equal(one, other) and first.results(one) == second.results(other)
    assert (first.hashes, first.order) == (second.hashes, second.order)
    system.tokenizer.add_tokens(["entirely new"])
    sharing.questions(tmp_path, SUITE, system)
    assert len(list(sharing.folder(tmp_path).glob("questions-*.npz"))) == 2 * len(SUITE.tasks)
