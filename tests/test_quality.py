"""Perplexity and divergence against a loop that anybody would write."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import random_system
from transformers import AutoModelForCausalLM, AutoTokenizer

from effbench.coverage import LLAMA
from effbench.data import FileSource, Windows
from effbench.measure import quality
from effbench.measure.quality import DenseLogProbabilities, score
from effbench.technique import System


def windows(*lengths: int, vocabulary: int = 1024) -> Windows:
    rng = np.random.default_rng(0)
    return Windows([rng.integers(3, vocabulary, length) for length in lengths], bytes_scored=100)


def plain_loop(model: torch.nn.Module, text: Windows) -> float:
    """Mean nats per token, one window after the other."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in text.ids:
            row = torch.from_numpy(ids)[None]
            logits = model(input_ids=row).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += len(ids) - 1
    return total / count


def test_perplexity_equals_a_plain_loop_also_through_the_cache_in_chunks(architecture: str) -> None:
    system, text = random_system(architecture, torch.float32), windows(200, 37, 128, 200)
    expected = plain_loop(system.model, text)
    for found in (score(system, text), *(score(system, text, through_cache=True, chunk=c) for c in (1, 50, 64))):
        assert found.nll_per_token == pytest.approx(expected, rel=1e-5)
        assert found.tokens == [199, 36, 127, 199]


def test_real_checkpoint_has_the_perplexity_of_a_plain_loop(stories: tuple[Path, Path]) -> None:
    folder, path = stories
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    system = System.dense(model, AutoTokenizer.from_pretrained(folder))
    text = FileSource(path, system.tokenizer).evaluation(system.context, 24)
    expected = math.exp(plain_loop(model, text))
    assert expected < 30
    assert score(system, text).perplexity == pytest.approx(expected, rel=1e-4)
    assert score(system, text, through_cache=True).perplexity == pytest.approx(expected, rel=1e-4)


def test_nats_of_each_kind_of_token_add_up_to_all_of_them() -> None:
    text = windows(64, 64)
    kinds = [np.random.default_rng(1).integers(0, 2, 64) for _ in text.ids]
    text = Windows(text.ids, 100, kinds, ("odd", "even"))
    found = score(random_system("llama"), text)
    for place in range(2):
        assert found.nats[place] == pytest.approx(sum(found.kind_nats[name][place] for name in ("odd", "even")))
        assert sum(found.kind_tokens[name][place] for name in ("odd", "even")) == 63


def test_dense_does_not_diverge_from_itself_and_another_model_does(tmp_path: Path) -> None:
    text, path = windows(64, 64, 30), tmp_path / "dense.npy"
    dense, other = random_system("llama"), random_system("llama", seed=1)
    writing = DenseLogProbabilities(path, text, 1024, write=True)
    score(dense, text, writing)
    writing.finish()
    same = score(dense, text, DenseLogProbabilities(path, text, 1024, write=False))
    assert sum(same.kl) == 0 and sum(same.agreed) == same.compared_tokens == 63 + 63 + 29
    different = score(other, text, DenseLogProbabilities(path, text, 1024, write=False))
    expected = 0.0
    with torch.no_grad():
        for ids in text.ids:
            row = torch.from_numpy(ids)[None]
            p, q = (s.model(input_ids=row).logits[0, :-1].float().log_softmax(-1) for s in (dense, other))
            expected += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
    assert sum(different.kl) == pytest.approx(expected, rel=1e-3)
    assert min(different.kl) > 0


@pytest.mark.parametrize("capped", [False, True])
def test_the_head_runs_on_scored_tokens_only_where_its_word_is_the_last_one(
    capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps what its head gives, so its logits are not the head's."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **LLAMA, head_dim=16, initializer_range=0.3, final_logit_softcapping=2.0 if capped else None
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    text, seen = windows(64, 64, 30), []
    monkeypatch.setattr(quality, "SLICE_BYTES", 10 * 4 * 1024)
    model.lm_head.register_forward_hook(lambda module, arguments, logits: seen.append(logits.shape[1]))
    found = score(System.dense(model, random_system("llama").tokenizer), text)
    assert max(seen) == (64 if capped else 10)
    assert found.nll_per_token == pytest.approx(plain_loop(model, text), rel=1e-6)


def test_divergence_is_over_the_tokens_that_fit_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, path = windows(64, 64, 30), tmp_path / "dense.npy"
    monkeypatch.setattr(quality, "REFERENCE_BYTES", 100 * 4 * 1024)
    monkeypatch.setattr(quality, "SLICE_BYTES", 10 * 4 * 1024)
    writing = DenseLogProbabilities(path, text, 1024, write=True)
    score(random_system("llama"), text, writing)
    writing.finish()
    found = score(random_system("llama", seed=1), text, DenseLogProbabilities(path, text, 1024, write=False))
    assert found.compared_tokens == 100 and found.kl[0] > 0 and found.kl[1] > 0 and found.kl[2] == 0


def test_bits_per_byte_is_nats_in_bits_over_the_bytes_scored() -> None:
    found = score(random_system("llama"), windows(64))
    assert found.bits_per_byte(200) == pytest.approx(sum(found.nats) / math.log(2) / 200)
