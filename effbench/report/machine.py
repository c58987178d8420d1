"""What one machine can do, and how near a model comes to it: measured and written to results/machine by one command.

python -m effbench.report.machine

The limits are measured anew, and beside them a copy by numpy, which knows nothing of torch. The model is a random Llama
of 300 million parameters, so nothing has to be fetched: its speed is that of any such model.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effbench import results
from effbench.measure import limits
from effbench.measure.derived import Row, rows
from effbench.measure.limits import Limits
from effbench.report.markdown import markdown
from effbench.report.table import VIEWS, View

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path("results") / "machine"
MODEL = Path("runs") / "random-llama-300m"
SHOWN = ("prefill_speedup", "decode_speedup", "decode_seconds_per_token", "stored_bytes")
ROOFLINE = (
    View("prefill_roofline_share", 0),
    View("decode_roofline_share", 0),
    View("decode_bytes_per_token", 0),
    View("decode_operations_per_token", 0),
    View("idealized_seconds", 0),
)


def page(folder: Path) -> str:
    """The tables of a folder that `main` filled."""
    found = json.loads((folder / "limits.json").read_text(encoding="utf-8"))
    measured = [Limits.of(content) for content in found["limits"]]
    records, _ = results.load_all(folder)
    views = [*(view for view in VIEWS if view.name in SHOWN), *ROOFLINE]
    said = [
        "# What a machine can do, and how near a model comes to it",
        "",
        f"Written by `{__doc__.split(chr(10))[2]}`.",
    ]
    said += ["", *limit_lines(measured), "", *_beside(measured, found["numpy_copy_bytes_per_second"]), ""]
    said += [
        "A share is the shortest time that the counted bytes and operations take by these limits over the measured"
    ]
    said += ["time: 1 is the roofline. The model is a Llama of 302 million random weights.", ""]
    return "\n".join(said) + "\n" + markdown(rows(records), views) + "\n" + _table(rows(records)[0])


def limit_lines(measured: list[Limits]) -> list[str]:
    """A table of what was measured."""
    blocks = list(measured[0].copy_bytes_per_second)
    dtypes = list(measured[0].operations_per_second)
    heads = [f"copy of {size >> 20} MiB (GB/s)" for size in blocks] + [f"{name} (1e9 operations/s)" for name in dtypes]
    lines = ["| threads | " + " | ".join(heads) + " | load average |", "|---:|" + "---:|" * (len(heads) + 1)]
    for limit in measured:
        cells = [f"{limit.copy_bytes_per_second[size] / 1e9:.1f}" for size in blocks]
        cells += [f"{limit.operations_per_second[name] / 1e9:.0f}" for name in dtypes]
        lines.append(f"| {limit.threads} | " + " | ".join(cells) + f" | {limit.load} |")
    return lines


def _beside(measured: list[Limits], copied: dict[str, float]) -> list[str]:
    size, rate = max((int(size), rate) for size, rate in copied.items())
    ours = measured[0].copy_bytes_per_second[size]
    return [
        f"Bytes read and written. numpy's copy of {size >> 20} MiB, in one thread and in turns with ours: "
        f"{rate / 1e9:.1f} GB/s; ours is {ours / rate - 1:+.1%} off."
    ]


def _table(row: Row) -> str:
    samples = row.record.samples
    lengths, seconds = samples["idealized_prompt_tokens"], samples["idealized_prefill_seconds"]
    cells = ", ".join(f"{int(at)} tokens {1000 * value:.1f} ms" for at, value in zip(lengths, seconds, strict=True))
    return (
        f"Idealized runtime of dense: prefill of {cells}; then {1000 * samples['idealized_slope'][0]:.2f} ms for each "
        "token after the first.\n"
    )


def beside_numpy(size: int, tries: int = 15) -> tuple[float, float]:
    """Bytes a second of a copy of `size` bytes by torch and by numpy in one thread, in turns, each the best of all."""
    import numpy as np
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    source = torch.ones(size // 4)
    target = torch.zeros_like(source)
    plain, there = source.numpy().copy(), target.numpy().copy()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(tries):
        for place, copy in enumerate((lambda: target.copy_(source), lambda: np.copyto(there, plain))):
            start = time.perf_counter()
            copy()
            times[place].append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * size / min(times[0]), 2 * size / min(times[1])


def make_model(folder: Path, width: int = 1024, layers: int = 21) -> None:
    """A random Llama with a tokenizer of bytes, in bfloat16; of 302 million parameters if not told otherwise."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = {letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def main() -> None:
    """Measure, and write limits, records and the page."""
    from effbench import harness
    from effbench.suite import Suite

    if not (MODEL / "config.json").is_file():
        make_model(MODEL)
    found = limits.measure("cpu")
    limits.save(found, limits.path_of("cpu"))
    size = max(found[0].copy_bytes_per_second)
    ours, theirs = beside_numpy(size)
    found[0].copy_bytes_per_second[size] = max(ours, found[0].copy_bytes_per_second[size])
    shutil.rmtree(FOLDER, ignore_errors=True)
    suite = Suite("machine", str(MODEL), ("rtn:bits=8",), rounds=5, new_tokens=32, device="cpu")
    harness.run(suite, FOLDER)
    content: dict[str, Any] = {
        "limits": [asdict(limit) for limit in found],
        "numpy_copy_bytes_per_second": {str(size): theirs},
    }
    results.write_atomically(FOLDER / "limits.json", json.dumps(content, indent=1) + "\n")
    results.write_atomically(FOLDER / "README.md", page(FOLDER))


if __name__ == "__main__":
    main()
