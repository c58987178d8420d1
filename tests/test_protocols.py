"""The published perplexities: each protocol against its publisher's own code, or a loop written from its definition."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from conftest import SHARED, random_system
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from synthetic_records import record
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from effbench import cli
from effbench.compare import compare
from effbench.data import Windows
from effbench.errors import RecordError, TextError, UnfitError, UsageError
from effbench.measure.derived import rows as derive
from effbench.measure.quality import Quality, score
from effbench.protocols import label, window_tokens
from effbench.reference.world import World
from effbench.report.frame import frame
from effbench.report.markdown import markdown
from effbench.results import save
from effbench.streams import StreamSource, pages, rolling, rows
from effbench.suite import Suite
from effbench.technique import System

WORDS = World().vocabulary[20:520]


def wikitext(pages: int, words: int) -> list[str]:
    """Rows in WikiText's form: a main heading, a lesser one, and paragraphs with blank rows around."""
    found: list[str] = []
    for page in range(pages):
        text = " ".join(WORDS[(page * words + place) % len(WORDS)] for place in range(words))
        found += ["", f" = {WORDS[page]} = \n", "", f" {text} \n", f" = = {WORDS[-page]} = = \n", "", f" {text} \n"]
    return [*found, ""]


def as_file(found: list[str]) -> str:
    return "".join(row or " \n" for row in found)


def score_by(
    protocol: str, path: Path, system: System, length: int, limit: int | None = None
) -> tuple[Quality, Windows]:
    windows = StreamSource(path, system.tokenizer, None, protocol).evaluation(length, limit)
    return score(system, windows), windows


def gptq_loop(model: torch.nn.Module, ids: torch.Tensor, length: int) -> float:
    """IST-DASLab/gptq, `opt_eval`: the mean loss of each whole window, times N, over the number of windows times N."""
    losses = []
    with torch.no_grad():
        for place in range(ids.numel() // length):
            window = ids[:, place * length : (place + 1) * length]
            logits = model(window).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]) * length)
    return float(torch.exp(torch.stack(losses).double().sum() / (len(losses) * length)))


def llama_cpp_loop(model: torch.nn.Module, ids: list[int], length: int, start: int | None) -> float:
    """tools/perplexity, `perplexity`: logits N/2 to N - 2 of each whole chunk, each for the token behind it."""
    nll, count = 0.0, 0
    with torch.no_grad():
        for chunk in (ids[at : at + length] for at in range(0, length * (len(ids) // length), length)):
            fed = chunk if start is None else [start, *chunk[1:]]
            logits = model(torch.tensor([fed])).logits[0].double()
            for place in range(length // 2, length - 1):
                nll -= float(logits[place, chunk[place + 1]] - logits[place].logsumexp(0))
                count += 1
    return math.exp(nll / count)


def by_lm_eval(system: System, documents: list[str], folder: Path) -> dict[str, float]:
    """lm-eval's own task `wikitext`, its detokenizer and metrics, on pages of ours, run by lm-eval."""
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in documents))
    original = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"
    (folder / "here.yaml").write_text(
        f"include: {original}\ntask: wikitext_here\ndataset_path: json\ndataset_name: null\n"
        f"training_split: null\nvalidation_split: null\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'test.jsonl'}}}, cache_dir: {folder / 'cache'}}}\n"
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["wikitext_here"])
    model = HFLM(pretrained=system.model, tokenizer=system.tokenizer, batch_size=1, device="cpu")
    found = evaluate(model, task, bootstrap_iters=0, verbosity="ERROR")
    assert found is not None
    return {name.partition(",")[0]: value for name, value in found["results"]["wikitext_here"].items()}


def starting(tokenizer: Any, starts: bool) -> PreTrainedTokenizerFast:
    """The same tokenizer that puts its start token before a text, or does not."""
    backend = tokenizer.backend_tokenizer
    if not starts:
        from tokenizers.processors import Sequence

        backend.post_processor = Sequence([])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )


def sharpen(model: torch.nn.Module) -> None:
    """As random as it comes, a model says nearly the same of every token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)


@pytest.fixture(params=[True, False], ids=["start token", "none"])
def system(request: pytest.FixtureRequest) -> System:
    """A random model with a context of 512, and a tokenizer with and without a start token."""
    found = random_system("gpt2", torch.float32)
    sharpen(found.model)
    found.tokenizer = starting(found.tokenizer, request.param)
    return found


def test_gptq_is_the_loop_of_its_code_over_the_joined_rows(system: System, tmp_path: Path) -> None:
    found = wikitext(3, 100)
    (tmp_path / "joined.txt").write_text("\n\n".join(found))
    (tmp_path / "file.txt").write_text(as_file(found))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in found))
    expected = gptq_loop(system.model, system.tokenizer("\n\n".join(found), return_tensors="pt")["input_ids"], 64)
    for name in ("joined.txt", "file.txt", "rows.jsonl"):
        quality, windows = score_by("gptq", tmp_path / name, system, 64)
        assert quality.perplexity == pytest.approx(expected, rel=1e-5)
        assert quality.tokens == [63] * (windows.text_tokens // 64)


def test_llama_cpp_scores_the_second_half_of_each_window(system: System, tmp_path: Path) -> None:
    found = wikitext(3, 100)
    ids = system.tokenizer(as_file(found).removesuffix("\n"))["input_ids"]
    start = system.tokenizer.bos_token_id
    expected = llama_cpp_loop(system.model, ids, 64, start if ids[0] == start else None)
    for name, text in (("joined.txt", "\n\n".join(found)), ("file.txt", as_file(found))):
        (tmp_path / name).write_text(text)
        quality, _ = score_by("llama.cpp", tmp_path / name, system, 64)
        assert quality.perplexity == pytest.approx(expected, rel=1e-5)
        assert set(quality.tokens) == {31}
    (tmp_path / "short.txt").write_text(" ".join(WORDS[:100]))
    with pytest.raises(TextError, match="fewer than two windows"):
        score_by("llama.cpp", tmp_path / "short.txt", system, 64)


def test_lm_eval_is_what_lm_eval_says_of_the_same_pages(system: System, tmp_path: Path) -> None:
    found = wikitext(3, 300)
    (tmp_path / "joined.txt").write_text("\n\n".join(found))
    (tmp_path / "pages.jsonl").write_text(
        "".join(json.dumps({"text": page}) + "\n" for page in pages(tmp_path / "joined.txt"))
    )
    theirs = by_lm_eval(system, pages(tmp_path / "joined.txt"), tmp_path / "theirs")
    for name in ("joined.txt", "pages.jsonl"):
        quality, windows = score_by("lm-eval", tmp_path / name, system, system.context)
        assert max(map(len, windows.ids)) == system.context + 1  # the longest that its last token fits behind
        assert quality.perplexity_per(windows.words_scored) == pytest.approx(theirs["word_perplexity"], rel=1e-5)
        assert quality.perplexity_per(windows.bytes_scored) == pytest.approx(theirs["byte_perplexity"], rel=1e-5)
        assert quality.bits_per_byte(windows.bytes_scored) == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 31])
def test_rolling_windows_are_those_of_lm_eval(count: int) -> None:
    ids = list(range(100, 100 + count))
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 7, 8, 1)]
    ours = [(ids[:first].tolist(), ids[first:].tolist()) for ids, first in rolling(ids, 7, 8)]
    assert ours == [(list(context), list(predicted)) for context, predicted in theirs]


def test_token_word_and_byte_say_the_same_nats(tmp_path: Path) -> None:
    system = random_system("llama", torch.float32)
    (tmp_path / "text.txt").write_text("\n\n".join(wikitext(2, 120)))
    for protocol in ("gptq", "lm-eval", "llama.cpp"):
        quality, windows = score_by(protocol, tmp_path / "text.txt", system, 64)
        nats = sum(quality.nats)
        assert sum(quality.tokens) * math.log(quality.perplexity) == pytest.approx(nats, rel=1e-12)
        assert windows.words_scored * math.log(quality.perplexity_per(windows.words_scored)) == pytest.approx(nats)
        bits = quality.bits_per_byte(windows.bytes_scored)
        assert bits == pytest.approx(math.log2(quality.perplexity_per(windows.bytes_scored)), rel=1e-12)


def test_both_forms_of_wikitext_are_the_same_rows_and_other_text_is_left_alone(tmp_path: Path) -> None:
    found = wikitext(2, 30)
    for name, text in (("joined.txt", "\n\n".join(found)), ("file.txt", as_file(found))):
        (tmp_path / name).write_text(text)
        assert rows(tmp_path / name) == found
    assert [page.split("\n")[0] for page in pages(tmp_path / "file.txt")] == [f" = {word} = " for word in WORDS[:2]]
    other = "Once upon a time.\n\n there was\n\na dog \n"
    (tmp_path / "other.txt").write_text(other)
    assert rows(tmp_path / "other.txt") == pages(tmp_path / "other.txt") == [other]


def test_windows_survive_their_file_with_what_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(wikitext(2, 120)))
    source = StreamSource(tmp_path / "text.txt", random_system("llama").tokenizer, None, "lm-eval")
    windows = source.evaluation(64, None)
    windows.save(tmp_path / "windows.npz")
    again = Windows.load(tmp_path / "windows.npz")
    assert again.firsts == windows.firsts and again.scored == windows.scored and again.digest == windows.digest
    assert (again.words_scored, again.text_tokens, again.window_tokens) == (
        windows.words_scored,
        windows.text_tokens,
        64,
    )
    with pytest.raises(UnfitError, match="scores all of --text"):
        source.training(1, 8, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--protocol gptq", "needs a text"),
        ("--text T --protocol gptq --window 1", "at least 2 tokens"),
        ("--text T --protocol llama.cpp --window 600", "--window 512 or less"),
        ("--text T --window 600", "--window 512 or less"),
        ("--protocol ppl", "is not one of"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_measured(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    words = words.replace("T ", f"{tmp_path / 'text.txt'} ")
    assert cli.main(["run", "ref-70k", "--out", str(tmp_path / "out"), *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_windows_are_as_long_as_the_protocol_and_the_context_allow() -> None:
    assert window_tokens("gptq", None, 4096) == 2048 and window_tokens("gptq", None, 1024) == 1024
    assert window_tokens("lm-eval", None, 4096) == 4096 and window_tokens("llama.cpp", None, 4096) == 512
    with pytest.raises(UsageError, match="no protocol 'gtpq'; did you mean 'gptq'"):
        Suite(protocol="gtpq", text="text.txt")


def test_rows_of_several_protocols_share_no_column_and_are_not_compared(tmp_path: Path) -> None:
    by_us, theirs = record("dense"), record("rtn:bits=4", nats=0.1)
    theirs.settings |= {"protocol": "gptq", "window": None}
    theirs.provenance["text"] = {"window": 1024}
    found = derive([by_us, theirs])
    assert [label(row.record) for row in found] == ["document", "gptq 1024"]
    text = markdown(found)
    heads, lines = text.split("\n")[2], [line.split("|") for line in text.split("\n")[4:6]]
    place, other = (heads.split("|").index(f" ppl ({name}) ") for name in ("document", "gptq 1024"))
    assert [line[place].strip() != "–" for line in lines] == [True, False]
    assert [line[other].strip() != "–" for line in lines] == [False, True]
    assert "never in one column" in text and "scored by another protocol" in text
    table = frame(found)
    assert table["perplexity (document)"].notna().tolist() == [True, False]
    assert table["protocol"].tolist() == ["document", "gptq 1024"] and "perplexity" not in table
    alone = frame(derive([by_us]))
    assert alone["perplexity"].notna().all()
    for name, row in (("one", by_us), ("two", record("dense"))):
        if name == "two":
            row.settings |= {"protocol": "gptq"}
        save(row, tmp_path / name)
    with pytest.raises(RecordError, match="protocol is 'document' in one and 'gptq'"):
        compare(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def gpt2_shaped() -> System:
    """A small random GPT-2 with the real tokenizer, where it lies beside this repository."""
    tokenizer = SHARED / "models" / "gpt2-tokenizer"
    if not tokenizer.is_dir() or not (SHARED / "text" / "wikitext2_raw_test_hfjoin.txt").is_file():
        pytest.skip("WikiText-2 and GPT-2's tokenizer are not beside this repository")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    sharpen(model)
    return System.dense(model, AutoTokenizer.from_pretrained(tokenizer))


WIKITEXT = SHARED / "text" / "wikitext2_raw_test_hfjoin.txt"


def test_wikitext_2_by_each_protocol_is_what_is_published(gpt2_shaped: System, tmp_path: Path) -> None:
    """The first windows and pages of the stream of 287,644 tokens; all of it takes minutes and gave the same."""
    system, text = gpt2_shaped, WIKITEXT.read_text()
    quality, windows = score_by("gptq", WIKITEXT, system, 1024, limit=3)
    assert windows.text_tokens == 287_644
    ids = torch.tensor([system.tokenizer(text[:20_000], verbose=False)["input_ids"][: 3 * 1024]])
    assert quality.perplexity == pytest.approx(gptq_loop(system.model, ids, 1024), rel=1e-5)

    found = pages(WIKITEXT)
    original = as_file(rows(WIKITEXT))
    assert len(original.encode()) == 1_290_590 and len(found) == 62  # as distributed, and as lm-eval counts them
    theirs = by_lm_eval(system, found[:1], tmp_path / "theirs")
    quality, windows = score_by("lm-eval", WIKITEXT, system, 1024, limit=1)
    assert quality.perplexity_per(windows.words_scored) == pytest.approx(theirs["word_perplexity"], rel=1e-5)

    quality, _ = score_by("llama.cpp", WIKITEXT, system, 512, limit=2)
    ids = system.tokenizer(original[:20_000], verbose=False)["input_ids"][: 2 * 512]
    assert quality.perplexity == pytest.approx(llama_cpp_loop(system.model, ids, 512, None), rel=1e-5)
