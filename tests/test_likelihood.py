"""What sequences share is run once, and each choice still gets the log-likelihood that it gets alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from effbench.coverage import LLAMA, VOCABULARY
from effbench.measure import likelihood
from effbench.measure.encoding import Choices
from effbench.measure.likelihood import Likelihoods, reach, takes_trees
from effbench.measure.prefixes import fitting, lay_out
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World
from effbench.technique import System

SHARPER = {"initializer_range": 0.1}
"""Weights large enough for attention to matter."""
BLOOM = {**VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
MAMBA = {**VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
MODELS: dict[str, tuple[Any, bool]] = {
    "llama": (transformers.LlamaConfig(**LLAMA, **SHARPER), True),
    "eager": (transformers.LlamaConfig(**LLAMA, **SHARPER, attn_implementation="eager"), True),
    "soft-capped": (transformers.Gemma2Config(**LLAMA, **SHARPER, head_dim=16, sliding_window=48), True),
    "experts": (transformers.MixtralConfig(**LLAMA, **SHARPER, num_local_experts=4), True),
    "alibi": (transformers.BloomConfig(**BLOOM, **SHARPER), False),
    "state space": (transformers.MambaConfig(**MAMBA, **SHARPER), False),
}


def system_of(config: Any, dtype: torch.dtype = torch.float32) -> System:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=config._attn_implementation_internal
    )
    return System.dense(model.eval(), build_tokenizer(World().vocabulary))


def asked() -> list[tuple[list[int], list[int]]]:
    """Contexts with choices of one token and of several, twins that differ at the end of the context, and repeats."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        context = rng.integers(3, 1024, rng.integers(3, 60)).tolist()
        pairs += [(context, rng.integers(3, 1024, length).tolist()) for length in (1, 1, 3, 9)]
        pairs += [([*context[:-1], token], [5, 6, 7]) for token in (8, 9)]
    return [*pairs, pairs[2], *(([3], choice) for _, choice in pairs[:4])]


def alone(system: System, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Each choice by a plain pass of its own."""
    values, greedy = [], []
    for context, choice in pairs:
        with torch.inference_mode():
            logits = system.model(input_ids=torch.tensor([context + choice[:-1]]), use_cache=False).logits[0]
        found = torch.log_softmax(logits[len(context) - 1 :].double(), -1)
        values.append(float(found.gather(-1, torch.tensor(choice)[:, None]).sum()))
        greedy.append(found.argmax(-1).tolist() == choice)
    return np.array(values), np.array(greedy)


@pytest.mark.parametrize("name", MODELS)
def test_each_choice_gets_what_it_gets_alone(name: str) -> None:
    config, trees = MODELS[name]
    system, pairs = system_of(config), asked()
    assert takes_trees(system) is trees
    values, greedy = Likelihoods(system, batch_tokens=200).answer(Choices.of(pairs))
    expected, best = alone(system, pairs)
    assert np.abs(values - expected).max() < 2e-5
    assert (greedy == best).all()


def test_trying_out_a_model_tells_rounding_from_a_wrong_place() -> None:
    assert takes_trees(system_of(MODELS["llama"][0], torch.bfloat16))
    assert not takes_trees(system_of(MODELS["alibi"][0], torch.bfloat16))


def test_greedy_choices_are_found() -> None:
    system = system_of(MODELS["llama"][0])
    pairs = []
    for context, _ in asked()[:6]:
        ids = torch.tensor([context])
        for _ in range(4):
            ids = torch.cat([ids, system.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        best = ids[0, len(context) :].tolist()
        pairs += [(context, best), (context, [*best[:-1], best[-1] ^ 1])]
    _, greedy = Likelihoods(system).answer(Choices.of(pairs))
    assert greedy.tolist() == [True, False] * 6


def test_shared_tokens_are_run_once_and_only_scored_ones_reach_the_head() -> None:
    system = system_of(MODELS["llama"][0])
    context = list(range(3, 103))
    pairs = [(context, [10 * number + place for place in range(11)]) for number in range(1, 5)]
    run, scored = [], []
    lm = Likelihoods(system)
    assert lm.answer(Choices.of(pairs[:1]))[0].shape == (1,)
    system.model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    system.model.lm_head.register_forward_hook(lambda module, args, logits: scored.append(logits.shape[:-1].numel()))
    lm.answer(Choices.of(pairs))
    assert sum(run) == 100 + 4 * 10
    assert sum(scored) == 1 + 4 * 10


def test_a_model_without_a_head_of_its_own_gives_the_same() -> None:
    system, pairs = system_of(MODELS["llama"][0]), asked()
    usual, _ = Likelihoods(system).answer(Choices.of(pairs))
    system.model.get_output_embeddings = lambda: None
    assert np.abs(Likelihoods(system).answer(Choices.of(pairs))[0] - usual).max() < 2e-5


def test_sequences_beyond_a_sliding_window_are_run_as_they_are() -> None:
    config = transformers.MistralConfig(**LLAMA, **SHARPER, sliding_window=40)
    system, pairs = system_of(config), asked()
    assert max(len(context) for context, _ in pairs) > 45
    assert reach(config) == 40 and takes_trees(system)
    assert np.abs(Likelihoods(system).answer(Choices.of(pairs))[0] - alone(system, pairs)[0]).max() < 2e-5


def test_numbers_that_say_how_far_a_layer_looks_back_are_told_from_others() -> None:
    assert reach(transformers.Qwen2Config(**LLAMA, max_window_layers=28)) == 2**31
    assert reach(transformers.MixtralConfig(**LLAMA)) == 2**31
    assert reach(transformers.Llama4TextConfig(**LLAMA, attention_chunk_size=128)) == 128
    factors = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    scaled = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = transformers.Phi3Config(**LLAMA, rope_parameters=scaled, original_max_position_embeddings=256)
    assert reach(config) == 256


def test_a_row_is_a_tree_in_which_each_token_sees_its_own_beginning() -> None:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 3, rng.integers(1, 9)) for _ in range(60)]
    rows = lay_out(sequences, longest=40, branching=True, width=2**30)
    assert sorted(number for row in rows for number, _ in row.members) == list(range(60))
    assert [len(row) for row in rows] == sorted((len(row) for row in rows), reverse=True)
    assert len(rows[0]) <= 40 and sum(map(len, rows)) < 0.8 * sum(map(len, sequences))
    for row in rows:
        slot = np.arange(len(row))
        seen = (slot[:, None] >= slot) & (slot[:, None] < row.ends)
        for number, slots in row.members:
            assert row.ids[slots].tolist() == sequences[number].tolist()
            assert row.places[slots].tolist() == list(range(len(slots)))
            for place, at in enumerate(slots):
                assert np.flatnonzero(seen[at]).tolist() == slots[: place + 1].tolist()


def test_without_branching_only_beginnings_of_each_other_share_a_row() -> None:
    sequences = [np.array(ids) for ids in ([1, 2, 3], [1, 2], [1, 2, 4], [1, 2, 3, 5], [1, 2, 3])]
    rows = lay_out(sequences, longest=40, branching=False, width=64)
    assert [row.ids.tolist() for row in rows] == [[1, 2, 3, 5], [1, 2, 4]]
    assert not any(row.branches for row in rows)


def test_sharing_little_is_not_worth_attention_over_a_longer_row() -> None:
    start = list(range(100))
    long = [np.array([*start, *range(end, end + 50)]) for end in (200, 300)]
    short = [np.array([1, *range(end, end + 200)]) for end in (200, 500)]
    assert len(lay_out(long, longest=2048, branching=True, width=64)) == 1
    assert len(lay_out(short, longest=2048, branching=True, width=64)) == 2


def test_a_batch_keeps_to_its_tokens_and_to_what_is_scored() -> None:
    rows = lay_out([np.full(30, number) for number in range(9)], longest=99, branching=True, width=64)
    assert fitting(rows, [1] * 9, tokens=100, most_scored=99) == 3
    assert fitting(rows, [20] * 9, tokens=1000, most_scored=50) == 2
    assert fitting(rows, [70] * 9, tokens=10, most_scored=50) == 1
    assert fitting(rows[:2], [1] * 2, tokens=1000, most_scored=50) == 2


def test_too_little_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    system, pairs = system_of(MODELS["llama"][0]), asked()
    usual, _ = Likelihoods(system).answer(Choices.of(pairs))
    plain = likelihood.tree_logits

    def scarce(model: Any, rows: list[Any], *others: Any) -> torch.Tensor:
        if len(rows) * len(rows[0]) > 250:
            raise torch.OutOfMemoryError
        return plain(model, rows, *others)

    lm = Likelihoods(system, batch_tokens=1000)
    monkeypatch.setattr(likelihood, "tree_logits", scarce)
    assert np.abs(lm.answer(Choices.of(pairs))[0] - usual).max() < 2e-5
    assert lm.batch_tokens <= 250
