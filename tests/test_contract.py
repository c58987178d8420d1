"""The contract over every technique there is: a new file is tested the moment it exists."""

import pytest

from effbench import contract, registry


@pytest.mark.parametrize("name", registry.names())
def test_technique_keeps_the_contract(name: str) -> None:
    problems = [f"{result.name}: {result.problem}" for result in contract.check(name) if result.problem]
    assert not problems, "\n".join(problems)
