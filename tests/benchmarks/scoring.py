"""How long scoring takes beside lm-eval's own model, on the same items, and whether it gives the same.

    OMP_NUM_THREADS=1 python tests/benchmarks/scoring.py ../shared/data 500

The folder has mc/<task>.jsonl, models/gpt2-tokenizer and models/TinyStories-656K; tasks may be named behind the number.
lm-eval's model runs at the fastest of some batch sizes. Blocks of items alternate between the two; what counts is
processor time, of one thread. What is measured goes to results/scoring/measured.json, task by task, and the page beside
it is written from that; tasks that are there are left out unless they are named. `perplexity` and `budgets` name the
page's other parts.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from lm_eval.api.model import TemplateLM

from effbench import models
from effbench.data import FileSource
from effbench.measure.accuracy import SystemLM
from effbench.measure.host import machine
from effbench.measure.likelihood import BATCH_TOKENS
from effbench.measure.prefixes import lay_out
from effbench.measure.quality import score
from effbench.measure.tasks import Asking, load_tasks, quiet
from effbench.technique import System
from effbench.worker import _tune_allocator

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande", "boolq")
SIZES = {"boolq": (1, 2, 4)}
USUAL_SIZES = (4, 8, 16)
BLOCK = 100
BUDGETS = (128, 256, 512, 1024, 2048, 4096, 8192)
OUT = Path(__file__).parents[2] / "results" / "scoring"


def llama_60m(data: Path) -> System:
    """A random Llama of 60 million parameters, 26 of them its vocabulary's."""
    tokenizer = models.load_tokenizer(str(data / "models" / "gpt2-tokenizer"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50257,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=50256,
        eos_token_id=50256,
    )
    return System.dense(transformers.LlamaForCausalLM(config).eval(), tokenizer)


def requests(name: str, data: Path, items: int) -> tuple[Any, list[list[Any]]]:
    """A task and the requests of each of its first items, as lm-eval's YAML makes them."""
    with quiet():
        task = load_tasks([name], Asking(data=str(data / "mc")))["tasks"][name]
        task.build_all_requests(limit=items)
    found: dict[int, list[Any]] = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request)
    return task, [found[number] for number in sorted(found)]


def timed(lm: Any, asked: list[Any]) -> tuple[float, list[tuple[float, bool]]]:
    start = time.process_time()
    with torch.inference_mode():
        answers = lm.loglikelihood(asked, disable_tqdm=True)
    return time.process_time() - start, answers


def theirs(system: System, size: int, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=system.model, tokenizer=system.tokenizer, batch_size=size, device="cpu", **options)


def can_be_split(lm: SystemLM, item: list[Any]) -> bool:
    """Whether each choice has a token that reaches not into its context; lm-eval's own model stops at others."""
    return all(TemplateLM._encode_pair(lm, *request.args)[1] for request in item)


def tokens(lm: SystemLM, asked: list[Any]) -> tuple[int, int]:
    """How many tokens have to be run if equal sequences are run once, and if equal beginnings are."""
    sequences = lm._likelihoods._sequences(lm.encode(asked))[0]
    apart = sum(len(sequence) for sequence in {sequence.tobytes(): sequence for sequence in sequences}.values())
    width = lm.system.config.hidden_size
    rows = lay_out(sequences, longest=lm.system.context, branching=True, width=width)
    return apart, sum(map(len, rows))


def measure(system: System, name: str, data: Path, items: int) -> dict[str, Any]:
    task, asked = requests(name, data, items)
    ours = SystemLM(system)
    wanted = len(asked)
    asked = [item for item in asked if can_be_split(ours, item)]
    first = [request for item in asked[:24] for request in item]
    timed(ours, first)
    tried = {size: timed(theirs(system, size), first)[0] for size in SIZES.get(name, USUAL_SIZES)}
    size = min(tried, key=lambda one: tried[one])
    other = theirs(system, size)
    mine, his, answers = [], [], []
    for start in range(0, len(asked), BLOCK):
        block = [request for item in asked[start : start + BLOCK] for request in item]
        order = ((ours, mine), (other, his)) if start // BLOCK % 2 else ((other, his), (ours, mine))
        found = {}
        for lm, seconds in order:
            took, found[id(lm)] = timed(lm, block)
            seconds.append(took)
        answers += list(zip(block, found[id(ours)], found[id(other)], strict=True))
    # lm-eval adds up in float32, whose last digit of a long text's thousands is worth more than what is allowed
    unsure = [place for place, (_, one, two) in enumerate(answers) if abs(one[0] - two[0]) > 5e-5]
    exact = theirs(system, size, softmax_dtype="float64")
    again = timed(exact, [answers[place][0] for place in unsure])[1] if unsure else []
    differences = [abs(one[0] - two[0]) for _, one, two in answers]
    raw = max(differences)
    for place, (value, _) in zip(unsure, again, strict=True):
        differences[place] = abs(answers[place][1][0] - value)
    results = [[], []]
    place = 0
    for item in asked:
        for kind in (1, 2):
            said = [answers[number][kind] for number in range(place, place + len(item))]
            results[kind - 1].append(task.process_results(item[0].doc, said))
        place += len(item)
    apart, shared = tokens(ours, [request for item in asked for request in item])
    return {
        "items": len(asked),
        "left_out": wanted - len(asked),
        "choices": len(answers),
        "batch_size": size,
        "tried_seconds": tried,
        "seconds": mine,
        "lm_eval_seconds": his,
        "tokens_apart": apart,
        "tokens_shared": shared,
        "largest_difference": max(differences),
        "largest_difference_as_printed": raw,
        "added_again": len(unsure),
        "greedy_equal": all(one[1] == two[1] for _, one, two in answers),
        "items_equal": sum(one == two for one, two in zip(*results, strict=True)),
        "metrics": sorted(results[0][0]),
    }


def perplexity(system: System, data: Path, windows: int = 8, rounds: int = 5) -> dict[str, Any]:
    """WikiText-2's test stream in windows, and two plain loops over them: all logits of a window at once, and the head
    on pieces of it, which is the fastest way found."""
    source = FileSource(data / "text" / "wikitext2_raw_test_hfjoin.txt", system.tokenizer)
    text = source.evaluation(1024, windows)
    model: Any = system.model
    entropy = partial(torch.nn.functional.cross_entropy, reduction="sum")

    def whole() -> float:
        total = 0.0
        for ids in text.ids:
            row = torch.from_numpy(ids)[None]
            total += float(entropy(model(input_ids=row, use_cache=False).logits[0, :-1], row[0, 1:]))
        return total

    def pieces() -> float:
        total = 0.0
        for ids in text.ids:
            row = torch.from_numpy(ids)[None]
            hidden = model.model(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
            for some, wanted in zip(hidden.split(256), row[0, 1:].split(256), strict=True):
                total += float(entropy(model.lm_head(some), wanted))
        return total

    ways = {"ours": lambda: sum(score(system, text).nats), "whole windows": whole, "the head on pieces": pieces}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    nats = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, way in ways.items():
                start = time.process_time()
                nats[name] = way()
                if number:
                    seconds[name].append(time.process_time() - start)
    return {"windows": len(text.ids), "seconds": seconds, "nats": nats}


def budgets(system: System, name: str, data: Path, rounds: int = 3) -> dict[str, list[float]]:
    """Seconds for a task's first items by the tokens that are run together, in turn."""
    asked = [request for item in requests(name, data, 60)[1] for request in item]
    found: dict[str, list[float]] = {str(tokens): [] for tokens in BUDGETS}
    for number in range(rounds + 1):
        for tokens in BUDGETS:
            took = timed(SystemLM(system, batch_tokens=tokens), asked)[0]
            if number:
                found[str(tokens)].append(took)
    return found


def page(measured: dict[str, Any]) -> str:
    lines = [
        "# Scoring beside lm-eval's own model",
        "",
        "Processor seconds of one thread for the same items, with lm-eval's `HFLM` at the fastest of some batch sizes; "
        f"blocks of {BLOCK} items alternate. *tokens*: those that have to be run if equal sequences are run once, by "
        "those if equal beginnings are: what sharing alone would give. Above that lie filling, the head over tokens "
        "that are not scored, and calls. *same*: items with the same result by every metric of the task.",
        "",
    ]
    for name, found in measured["models"].items():
        lines += [
            f"## {name}",
            "",
            "| task | items | HFLM (s) | at batch | ours (s) | times faster | tokens | same | Δ log-likelihood |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for task, row in ((task, found[task]) for task in TASKS if task in found):
            mine, his = np.array(row["seconds"]), np.array(row["lm_eval_seconds"])
            ratios = np.log(his / mine)
            spread = 2 * ratios.std(ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
            ratio = his.sum() / mine.sum()
            lines.append(
                f"| {task} | {row['items']} | {his.sum():.1f} | {row['batch_size']} | {mine.sum():.1f} "
                f"| {ratio:.2f} [{ratio * math.exp(-spread):.2f}–{ratio * math.exp(spread):.2f}] "
                f"| {row['tokens_apart'] / row['tokens_shared']:.2f} "
                f"| {row['items_equal']} ({', '.join(row['metrics'])}) | {row['largest_difference']:.0e} |"
            )
        lines.append("")
    if "perplexity" in measured:
        found = measured["perplexity"]
        fastest = min(
            (name for name in found["seconds"] if name != "ours"), key=lambda name: sum(found["seconds"][name])
        )
        lines += [
            f"## Perplexity of {found['windows']} windows of 1,024 tokens of WikiText-2, the model of 60 million",
            "",
            "| loop | seconds (median) | nats | ours / this |",
            "|---|---:|---:|---:|",
        ]
        for name, seconds in found["seconds"].items():
            ratio = np.median(np.array(found["seconds"]["ours"]) / np.array(seconds))
            note = " (the fastest)" if name == fastest else ""
            lines.append(f"| {name}{note} | {np.median(seconds):.2f} | {found['nats'][name]:.3f} | {ratio:.3f} |")
        lines.append("")
    if "budgets" in measured:
        lines += [
            "## Tokens that are run together",
            "",
            f"Seconds for 60 items of {', '.join(next(iter(measured['budgets'].values())))} by the tokens in a batch, "
            f"by those at {BATCH_TOKENS['cpu']:,}, which is what a CPU is given (medians of rounds in turn).",
            "",
            f"| model | task | {' | '.join(f'{tokens:,}' for tokens in BUDGETS)} |",
            "|---|---|" + "---:|" * len(BUDGETS),
        ]
        for name, tasks in measured["budgets"].items():
            for task, seconds in tasks.items():
                middle = {tokens: float(np.median(took)) for tokens, took in seconds.items()}
                own = middle[str(BATCH_TOKENS["cpu"])]
                cells = [f"{middle[str(tokens)] / own:.2f}" for tokens in BUDGETS]
                lines.append(f"| {name} | {task} | {' | '.join(cells)} |")
        lines.append("")
    left = sum(row.get("left_out", 0) for found in measured["models"].values() for row in found.values())
    added = sum(row["added_again"] for found in measured["models"].values() for row in found.values())
    lines += [
        f"- [ ]: two standard errors over blocks. Δ: the largest; greedy choices are the same throughout: "
        f"{'yes' if all(r['greedy_equal'] for f in measured['models'].values() for r in f.values()) else '**no**'}.",
        f"- {added} long choices, where float32 sums differ in their last digit by more than 5e-5, are compared with "
        "HFLM's own sums in float64.",
        f"- left out: {left} items with a choice that a token of its context swallows, where HFLM stops.",
        f"- machine: {measured['machine']} · float32, one thread · torch {measured['torch']}, "
        f"transformers {measured['transformers']}, lm-eval {measured['lm_eval']}, Python {measured['python']}",
        "- made by `OMP_NUM_THREADS=1 python tests/benchmarks/scoring.py ../shared/data 500`",
        "",
    ]
    return "\n".join(lines)


def _read(stored: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {"models": {}}
    return found


def main(data: Path, items: int, wanted: list[str]) -> None:
    import lm_eval

    _tune_allocator()
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    stored, about = OUT / "measured.json", machine()
    about = {
        "machine": about["cpu"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
        "python": platform.python_version(),
    }

    def keep(news: dict[str, Any]) -> None:
        measured = _read(stored)
        for name, found in news.pop("models", {}).items():
            measured["models"].setdefault(name, {}).update(found)
        measured |= news | about
        OUT.mkdir(exist_ok=True)
        stored.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        (OUT / "README.md").write_text(page(measured), encoding="utf-8")

    if "perplexity" in wanted or not wanted and "perplexity" not in _read(stored):
        keep({"perplexity": perplexity(llama_60m(data), data)})
        wanted = [task for task in wanted if task != "perplexity"]
        if sys.argv[3:] and not wanted:
            return
    systems = {
        "TinyStories-656K": lambda: models.load(str(data / "models" / "TinyStories-656K"), "float32"),
        "Llama, 60 million random parameters, GPT-2's tokenizer": lambda: llama_60m(data),
    }
    if "budgets" in wanted:
        tasks = ("arc_easy", "piqa")
        keep(
            {"budgets": {name: {task: budgets(load(), task, data) for task in tasks} for name, load in systems.items()}}
        )
        return
    for name, load in systems.items():
        system = load()
        done = _read(stored)["models"].get(name, {})
        for task in wanted or [task for task in TASKS if task not in done]:
            found = measure(system, task, data, items)
            keep({"models": {name: {task: found}}})
            print(name, task, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
