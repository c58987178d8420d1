"""The kv_cache family: what is kept, that chunks do not matter, that the cache is as small as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, build
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from effbench import models, registry, store
from effbench.data import Data
from effbench.errors import TechniqueError, UnfitError
from effbench.measure.memory import cache_bytes
from effbench.measure.quality import window_logits
from effbench.technique import System
from effbench.toolbox.decoding import cache_argument, forward

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROTARY = ["llama", "qwen3", "gpt_neox", "mistral", "cohere", "gemma3_text"]
LEARNED = ["gpt2", "opt"]


def streaming(system: System, sinks: int = 4, window: int = 8, positions: str = "cache") -> System:
    technique = registry.get("sink_window")(sinks=sinks, window=window, positions=positions)
    reason = technique.unfit(system)
    if reason:
        raise UnfitError(reason)
    return technique.apply(system, Data(None, system.context, models.load))


def text(count: int, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(1))


def through(system: System, ids: Tensor, chunk: int) -> Tensor:
    return window_logits(system, ids, through_cache=True, chunk=chunk)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


CASES = [(kind, "original") for kind in [*ROTARY, *LEARNED]] + [(kind, "cache") for kind in ROTARY]


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_up_to_the_budget_nothing_differs_from_full_attention(kind: str, positions: str) -> None:
    dense = build(kind)
    ids = text(50)
    wanted = window_logits(dense, ids, through_cache=False)
    got = through(streaming(build(kind), 4, 16, positions), ids, 7)
    close(got[:, :20], wanted[:, :20])
    assert (got[:, 40:] - wanted[:, 40:]).abs().max() > 0.02 * wanted.abs().max()


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_text_in_chunks_gets_the_result_of_text_token_by_token(kind: str, positions: str) -> None:
    system = streaming(build(kind), 3, 8, positions)
    ids = text(70)
    wanted = through(system, ids, 1)
    for chunk in (7, 64):
        close(through(system, ids, chunk), wanted)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_query_sees_the_sinks_and_its_window_and_nothing_else(sinks: int, attention: str) -> None:
    """Against a dense pass under an explicit mask over all keys, at their original positions."""
    system = build("llama", attn_implementation=attention)
    system.model.set_attn_implementation(attention)
    ids = text(40)
    query, key = torch.arange(40)[:, None], torch.arange(40)
    seen = (key <= query) & ((key < sinks) | (key >= query - 8))
    mask = torch.zeros(1, 1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        wanted = system.model(input_ids=ids, attention_mask=mask).logits
    for chunk in (1, 11, 40):
        close(through(streaming(build_like(system), sinks, 8, "original"), ids, chunk), wanted)


def build_like(system: System) -> System:
    return System.dense(system.model, system.tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "cohere"])
def test_cache_positions_are_those_of_a_text_of_only_what_is_kept(kind: str) -> None:
    """A one-layer model's keys know nothing but their token, so the kept tokens alone must give the same logits."""
    system = build(kind, num_hidden_layers=1)
    ids = text(60, batch=1)
    kept = torch.cat([ids[:, :3], ids[:, -9:]], 1)
    with torch.inference_mode():
        wanted = system.model(input_ids=kept).logits[:, -1]
    for chunk in (1, 60):
        close(through(streaming(build_like(system), 3, 8, "cache"), ids, chunk)[:, -1], wanted)
    original = through(streaming(build_like(system), 3, 8, "original"), ids, 1)[:, -1]
    assert (original - wanted).abs().max() > 0.02 * wanted.abs().max()


def test_four_sinks_and_eight_recent_of_twenty_tokens_are_kept() -> None:
    system = streaming(build("llama"))
    for chunk in (1, 6, 20):
        cache = system.new_cache()
        for start in range(0, 20, chunk):
            forward(system.model, text(20)[:, start : start + chunk], cache, start)
        assert [layer.kept for layer in cache.layers] == [[*range(4), *range(12, 20)]] * 2
        assert cache.layers[0].keys.shape == (2, 2, 12, 8)
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize("positions", ["cache", "original"])
def test_the_cache_holds_no_more_bytes_than_sinks_and_window(chunk: int, positions: str) -> None:
    system = streaming(build("llama"), positions=positions)
    cache, token = system.new_cache(), 2 * 2 * 8 * 4  # two texts, two heads, width 8, float32
    for start in range(0, 128, chunk):
        forward(system.model, text(128)[:, start : start + chunk], cache, start)
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.values.untyped_storage().nbytes() == 12 * token
    assert cache_bytes(cache) <= 2 * 2 * 12 * token + 64  # and what a turn by one step needs


def test_a_token_that_was_evicted_is_forgotten_and_a_sink_is_not() -> None:
    system = build("llama", num_hidden_layers=1)
    ids = text(40, batch=1)
    for place, forgotten in ((0, False), (10, True), (39, False)):
        other = ids.clone()
        other[0, place] = 3 + (other[0, place] - 2) % 30
        one, two = (through(streaming(build_like(system)), each, 16)[:, -1] for each in (ids, other))
        assert torch.equal(one, two) == forgotten


def test_a_layer_with_a_window_of_its_own_keeps_no_more_than_that() -> None:
    system = streaming(build("gemma3_text"), 4, 16)
    cache = system.new_cache()
    forward(system.model, text(60), cache, 0)
    assert cache.layers[0].kept == [*range(52, 60)]
    assert cache.layers[1].kept == [*range(4), *range(44, 60)]


def test_a_model_that_masks_for_itself_is_not_given_evicted_keys() -> None:
    system = streaming(build("llama"))
    cache = system.new_cache()
    with pytest.raises(RuntimeError, match="feed them through effbench.toolbox.decoding.forward"):
        system.model(input_ids=text(30), **{cache_argument(system.model): cache})


@pytest.mark.parametrize("positions", ["cache", "original"])
def test_tokens_can_be_taken_back_while_the_past_is_recorded(positions: str) -> None:
    system = streaming(build("llama"), positions=positions)
    ids, cache = text(60), system.new_cache()
    forward(system.model, ids[:, :30], cache, 0)
    cache.activate_past_recording()
    forward(system.model, ids[:, 50:55], cache, 30)
    cache.crop(-5)
    assert [layer.kept for layer in cache.layers] == [[*range(4), *range(22, 30)]] * 2
    got = forward(system.model, ids[:, 30:36], cache, 30)
    close(got, through(system, ids, 1)[:, 30:36])
    plain = system.new_cache()
    forward(system.model, ids[:, :30], plain, 0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        plain.crop(-5)


def test_a_saved_policy_gives_the_same_logits(tmp_path: Path) -> None:
    system = streaming(build("gpt_neox"), 2, 8)
    store.save(system, tmp_path / "saved", "sink_window:sinks=2,window=8")
    content = json.loads((tmp_path / "saved" / "effbench.json").read_text())["new_cache"]["options"]
    assert content == {"sinks": 2, "window": 8, "layout": "halves", "rotates_like": "gpt_neox"}
    loaded = store.load(tmp_path / "saved")
    assert torch.equal(through(loaded, text(50), 16), through(system, text(50), 16))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gpt2", {}, "no rotation by which keys could be moved"),
        ("opt", {}, "no rotation by which keys could be moved"),
        ("mistral", {"sliding_window": 9}, "sliding window of 9 tokens already"),
        ("llama", {"max_position_embeddings": 12}, "nothing would be evicted"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "change with the length",
        ),
    ],
)
def test_a_model_that_does_not_fit_says_why(kind: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(UnfitError, match=reason):
        streaming(build(kind, **options))


@pytest.mark.parametrize("kind", ["bloom", "mpt", "mamba"])
def test_alibi_and_state_space_models_are_unfit(kind: str) -> None:
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2}
    small |= {"d_model": 32, "n_layers": 2, "n_heads": 4} if kind == "mpt" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**small)).eval()
    reason = registry.get("sink_window")(positions="original").unfit(System.dense(model, None))
    assert reason is not None and ("ALiBi" in reason or "one key and value" in reason)


def test_a_model_whose_keys_turn_otherwise_than_its_config_says_is_unfit() -> None:
    system = build("llama")
    system.model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(UnfitError, match="do not rotate with position as the config says"):
        streaming(system)


def test_another_kind_of_model_afterwards_is_unfit() -> None:
    system = streaming(build("llama"))
    with pytest.raises(UnfitError, match="put it after the technique that changes the model"):
        system.with_model(build("cohere").model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sinks": -1}, "got -1"), ({"window": 0}, "got 0"), ({"positions": "near"}, "got near")],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get("sink_window")(**options)
    with pytest.raises(TechniqueError, match=message):
        registry.build("sink_window", {key: str(value) for key, value in options.items()})


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_scaled_rotations_are_turned_as_the_model_turns_them(scaling: str) -> None:
    rope = {"rope_type": scaling, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling == "llama3" else {}
    system = build("llama", num_hidden_layers=1, rope_parameters={**rope, **more})
    ids = text(60, batch=1)
    kept = torch.cat([ids[:, :3], ids[:, -9:]], 1)
    with torch.inference_mode():
        wanted = system.model(input_ids=kept).logits[:, -1]
    close(through(streaming(system, 3, 8), ids, 60)[:, -1], wanted)


@pytest.fixture(scope="module")
def stories() -> tuple[System, Tensor]:
    folder, file = SHARED / "models" / "TinyStories-656K", SHARED / "text" / "tinystories_train_ascii.jsonl"
    if not (folder.is_dir() and file.is_file()):
        pytest.skip("the real checkpoint and its stories are not beside the repository")
    system = models.load(str(folder), "float32")
    documents = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    ids = system.tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return system, torch.tensor(ids[: 8 * 512]).view(8, 512)


def perplexity(system: System, ids: Tensor, *, through_cache: bool, chunk: int = 64) -> float:
    logits = window_logits(system, ids, through_cache=through_cache, chunk=chunk)[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


def test_a_real_model_scored_through_its_cache_equals_a_plain_pass(stories: tuple[System, Tensor]) -> None:
    system, ids = stories
    plain = perplexity(system, ids, through_cache=False)
    for chunk in (64, 500):
        assert perplexity(system, ids, through_cache=True, chunk=chunk) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("positions", ["cache", "original"])
def test_a_real_model_gets_worse_the_less_it_keeps(stories: tuple[System, Tensor], positions: str) -> None:
    """Over the first 192 tokens, since beyond the length of its stories this model does better with less context."""
    system, ids = stories[0], stories[1][:, :192]
    scores = [perplexity(system, ids, through_cache=False)]
    for window in (188, 12, 4):
        streamed = streaming(build_like(system), 4, window, positions)
        scores.append(perplexity(streamed, ids, through_cache=True))
        by_seven, at_once = (perplexity(streamed, ids[:2], through_cache=True, chunk=chunk) for chunk in (7, 192))
        assert by_seven == pytest.approx(at_once, rel=1e-4)
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert 1.2 * scores[1] < scores[2] < scores[3] / 1.2
