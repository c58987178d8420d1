"""The speculative family: the text is the model's own, greedy and sampled, whatever the draft."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, build
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Cache

from effbench import models, registry, store
from effbench.data import Data
from effbench.errors import UnfitError
from effbench.technique import DecodingPolicy, System
from effbench.toolbox.decoding import forward

CHECKPOINT = Path(__file__).parents[2] / "shared" / "data" / "models" / "TinyStories-656K"
KINDS = ("llama", "qwen3", "gpt2", "opt", "gpt_neox", "mistral")


def perturbed(system: System, size: float) -> System:
    """A draft that mostly agrees with `system`."""
    model: nn.Module = copy.deepcopy(system.model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * parameter.std() * torch.randn_like(parameter))
    return System.dense(model, system.tokenizer)


def speculate(system: System, draft: System, ahead: int = 4) -> System:
    technique = registry.get("draft")(model="mate", ahead=ahead)
    reason = technique.unfit(system)
    if reason:
        raise UnfitError(reason)
    return technique.apply(replace(system, parts={}), Data(None, system.context, lambda name: draft))


def prompts(system: System, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    high = min(system.config.vocab_size, 200)
    return [torch.randint(3, high, (1, length), generator=generator) for length in range(1, 6 * count, 6)][:count]


def plain(system: System, ids: Tensor, tokens: int, **more: object) -> Tensor:
    """One token for each pass, through the system's own cache."""
    return DecodingPolicy()(system, ids, tokens, **more).ids


def greedy_equals(system: System, draft: System, tokens: int = 40, ahead: int = 4) -> float:
    """Compare on several prompts; the share of proposed tokens that were accepted."""
    fast = speculate(system, draft, ahead)
    proposed = accepted = 0
    for ids in prompts(system):
        got = fast.generate(fast, ids, tokens)
        assert got.ids.tolist() == system.generate(system, ids, tokens).ids.tolist()
        assert got.ids.shape == (1, ids.shape[1] + tokens)
        assert got.passes + got.accepted == tokens - 1
        proposed, accepted = proposed + got.proposed, accepted + got.accepted
    return accepted / proposed


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_models_own_with_an_unrelated_draft(kind: str) -> None:
    assert greedy_equals(build(kind), build("gpt2", seed=9)) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_models_own_with_a_good_draft(kind: str) -> None:
    system = build(kind)
    share = greedy_equals(system, perturbed(system, 0.004))
    assert 0.5 < share <= 1


def test_a_draft_equal_to_the_model_has_everything_accepted() -> None:
    system = build()
    fast = speculate(system, build(), ahead=3)
    got = fast.generate(fast, prompts(system)[2], 41)
    assert (got.passes, got.proposed, got.accepted) == (10, 30, 30)


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_any_number_of_tokens_may_be_proposed(ahead: int) -> None:
    system = build()
    greedy_equals(system, perturbed(system, 0.05), 23, ahead)
    for tokens in (0, 1, 2, 3):
        fast = speculate(system, perturbed(system, 0.05), ahead)
        ids = prompts(system)[1]
        assert fast.generate(fast, ids, tokens).ids.tolist() == plain(system, ids, tokens).tolist()


@pytest.mark.parametrize("positions", ["cache", "original"])
def test_greedy_text_is_that_of_a_model_with_an_evicting_cache(positions: str) -> None:
    streaming = registry.get("sink_window")(sinks=2, window=6, positions=positions)
    for kind in ("llama", "mistral"):
        system = build(kind)
        dense = plain(system, prompts(system)[4], 40)
        evicting = streaming.apply(system, Data(None, 128, models.load))
        greedy_equals(evicting, perturbed(system, 0.05))
        assert not torch.equal(evicting.generate(evicting, prompts(system)[4], 40).ids, dense)


def test_after_drafting_the_cache_is_as_small_as_its_policy_says() -> None:
    system = registry.get("sink_window")(sinks=2, window=6).apply(build(), Data(None, 128, models.load))
    fast, made = speculate(system, build(seed=9)), []
    make = fast.new_cache

    def spy() -> Cache:
        made.append(make())
        return made[-1]

    fast.new_cache = spy
    got = fast.generate(fast, prompts(system)[3], 30)
    assert len(made) == 1
    for layer in made[0].layers:
        last = got.ids.shape[1] - 1  # the newest token was never fed
        assert layer.get_seq_length() == last
        assert layer.kept == [0, 1, *range(last - 6, last)]
        assert layer.keys.untyped_storage().nbytes() == 8 * 2 * 8 * 4


def test_a_text_ends_at_its_first_stop_token_wherever_it_was_proposed() -> None:
    system = build()
    fast = speculate(system, build())
    ids = prompts(system)[2]
    whole = plain(system, ids, 30)[0].tolist()
    for place in range(ids.shape[1], len(whole)):
        stop = whole[place]
        if stop in whole[ids.shape[1] : place]:
            continue
        got = fast.generate(fast, ids, 30, stop=[stop, 31])
        assert got.ids.tolist() == plain(system, ids, 30, stop=[stop, 31]).tolist()


verify = vars(import_module(registry.get("draft").__module__))["verify"]


def distributions(seed: int, rows: int, sharpness: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(rows, 8, generator=generator), -1)


def test_the_first_token_follows_the_models_distribution_in_forty_thousand_draws() -> None:
    draws, ahead, generator = 40_000, 4, torch.Generator().manual_seed(7)
    p, q = distributions(0, ahead + 1), distributions(1, ahead)
    proposed = torch.multinomial(q, draws, replacement=True, generator=generator).T
    accepted, token = verify(p.expand(draws, -1, -1), q.expand(draws, -1, -1), proposed, generator)
    first = torch.where(accepted > 0, proposed[:, 0], token)
    assert total_variation(first, p[0]) < 0.01  # 0.007 is what 40,000 exact draws are off by
    share, overlap = float((accepted > 0).float().mean()), float(torch.minimum(p[0], q[0]).sum())
    assert abs(share - overlap) < 3 * (overlap * (1 - overlap) / draws) ** 0.5
    # Where all are accepted the bonus is the model's own, and each further token obeys the same law.
    all_in = accepted == ahead
    assert total_variation(token[all_in], p[ahead]) < 0.5 * (8 / int(all_in.sum())) ** 0.5
    second = torch.where(accepted > 1, proposed[:, 1], token)[accepted > 0]
    assert total_variation(second, p[1]) < 0.01


def total_variation(tokens: Tensor, p: Tensor) -> float:
    return float((torch.bincount(tokens, minlength=len(p)) / len(tokens) - p).abs().sum() / 2)


def test_what_the_draft_never_proposes_can_still_be_drawn_and_the_impossible_is_rejected() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]]).expand(2000, -1, -1)
    q = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(2000, -1, -1)
    accepted, token = verify(p, q, torch.zeros(2000, 1, dtype=torch.long), torch.Generator().manual_seed(0))
    assert not accepted.any()
    assert set(token.tolist()) == {1, 2}


def test_sampled_texts_follow_the_models_distribution() -> None:
    """All texts of three tokens over a small vocabulary, against their exact probabilities."""
    system = build(vocab_size=8, words=8)
    fast = speculate(system, build(seed=4, vocab_size=8, words=8), ahead=2)
    ids, draws, temperature = torch.tensor([[3, 5, 4]]), 1500, 0.7
    texts = torch.tensor(list(product(range(8), repeat=3)))
    with torch.inference_mode():
        logits = system.model(input_ids=torch.cat([ids.expand(512, -1), texts], 1)).logits[:, 2:5]
    p = torch.log_softmax(logits / temperature, -1).gather(-1, texts[..., None]).sum((1, 2)).exp()
    seen = torch.zeros(512)
    for seed in range(draws):
        a, b, c = fast.generate(fast, ids, 3, temperature=temperature, seed=seed).ids[0, 3:].tolist()
        seen[a * 64 + b * 8 + c] += 1
    expected = draws * p
    likely = expected > 5
    parts = [*zip(seen[likely], expected[likely], strict=True), (seen[~likely].sum(), expected[~likely].sum())]
    chi_square = float(sum((got - wanted) ** 2 / wanted for got, wanted in parts))
    free = len(parts) - 1
    assert chi_square < free + 4 * (2 * free) ** 0.5


def test_the_same_seed_gives_the_same_text() -> None:
    system = build()
    fast = speculate(system, perturbed(system, 0.1))
    texts = [fast.generate(fast, prompts(system)[1], 30, temperature=1.0, seed=seed).ids for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_vocabularies_padded_to_different_widths_work_both_ways() -> None:
    for target, draft in ((32, 40), (40, 32)):
        system = build(vocab_size=target)
        greedy_equals(system, build("gpt2", seed=9, vocab_size=draft))
        fast = speculate(system, build(seed=9, vocab_size=draft))
        ids = fast.generate(fast, prompts(system)[1], 30, temperature=2.0, seed=3).ids
        assert int(ids.max()) < target


def test_beyond_the_drafts_context_the_model_decodes_alone() -> None:
    system = build()
    fast = speculate(system, build("gpt2", seed=9, max_position_embeddings=20))
    ids = prompts(system)[2]
    got = fast.generate(fast, ids, 40)
    assert torch.equal(got.ids, plain(system, ids, 40))
    assert 0 < got.proposed < 20


def test_a_saved_system_brings_its_draft(tmp_path: Path) -> None:
    system = registry.get("sink_window")(sinks=2, window=6).apply(build(), Data(None, 128, models.load))
    fast = speculate(system, perturbed(system, 0.05), ahead=3)
    store.save(fast, tmp_path / "saved", "sink_window:sinks=2,window=6+draft:model=mate,ahead=3")
    content = json.loads((tmp_path / "saved" / "effbench.json").read_text())
    assert content["generate"]["options"] == {"ahead": 3}
    loaded = store.load(tmp_path / "saved")
    for temperature in (0.0, 1.0):
        one, two = (s.generate(s, prompts(system)[2], 30, temperature=temperature) for s in (fast, loaded))
        assert one.ids.tolist() == two.ids.tolist() and one.accepted == two.accepted > 0


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        ({"words": 31}, "another vocabulary .31 tokens, the model has 40.; give model="),
        ({"kind": "mamba"}, "cannot be taken back"),
    ],
)
def test_a_draft_that_does_not_fit_says_why(draft: dict[str, object], reason: str) -> None:
    if draft.get("kind") == "mamba":
        config = CONFIG_MAPPING["mamba"](vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
        other = System.dense(AutoModelForCausalLM.from_config(config).eval(), build().tokenizer)
        with pytest.raises(UnfitError, match=reason):
            speculate(other, build())
    else:
        other = build(**draft)
    with pytest.raises(UnfitError, match=reason):
        speculate(build(), other)


def test_a_second_draft_a_batch_and_a_silly_option_are_refused() -> None:
    system = build()
    fast = speculate(system, build(seed=9))
    assert "already decides how tokens come out" in str(registry.get("draft")().unfit(fast))
    with pytest.raises(UnfitError, match="got a batch of 2"):
        fast.generate(fast, torch.ones(2, 3, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="got 0"):
        registry.get("draft")(ahead=0)


def test_a_real_model_drafted_by_a_weakened_copy_writes_its_own_text() -> None:
    if not CHECKPOINT.is_dir():
        pytest.skip("the real checkpoint is not beside the repository")
    system = models.load(str(CHECKPOINT), "float32")
    assert 0.2 < greedy_equals(system, perturbed(system, 0.1), 60) < 1


def test_in_bfloat16_greedy_text_differs_only_at_ties() -> None:
    """Where the two texts part, the tokens they chose lie within the rounding of the model's logits."""
    if not CHECKPOINT.is_dir():
        pytest.skip("the real checkpoint is not beside the repository")
    system = models.load(str(CHECKPOINT), "bfloat16")
    fast = speculate(system, perturbed(system, 0.1))
    for ids in prompts(system):
        one, two = plain(system, ids, 60)[0], fast.generate(fast, ids, 60).ids[0]
        different = (one != two).nonzero()
        if len(different):
            place = int(different[0])
            with torch.inference_mode():
                logits = forward(system.model, one[None, :place], system.new_cache(), 0, last=True)[0, -1].float()
            assert abs(logits[one[place]] - logits[two[place]]) <= logits.abs().max() / 64
