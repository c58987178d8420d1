"""Whether a model of 3 GB is compressed block by block from its files, and what becomes of a row short of memory.

    python tests/benchmarks/streaming.py /tmp/streaming

A random Llama of 1.5 billion weights in bfloat16 is written to that folder, unless it is there, and a whole run over it
is made under a limit of each process's data, as `ulimit -d` sets. Meanwhile the memory of every process that works at
a row is looked at: what is anonymous, which is all but the files' own pages. What came of it goes to
results/streaming/README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors.torch import save_file

from effbench import results
from effbench.measure.host import machine
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World

ROWS = ("rtn", "gptq:samples=2", "bitnet:steps=2")
LIMIT_BYTES = 7 * 10**9
"""Of each process's data. The 3 GB of mapped weights count, since they could be written to, and 1.5 GB that libraries
reserve."""
MOST_ANONYMOUS_BYTES = 2.5e9
BLOCKS_IN_SHARD = 6
OUT = Path(__file__).parents[2] / "results" / "streaming"


def write(folder: Path) -> None:
    """The checkpoint, shard by shard: at no time are there more weights in memory than one shard's."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shards: dict[int, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        place = int(name.split(".")[2]) // BLOCKS_IN_SHARD + 1 if ".layers." in name else 0
        shards.setdefault(place, {})[name] = parameter.shape
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    index = {}
    for place, shapes in sorted(shards.items()):
        file = f"model-{place + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    build_tokenizer(World().vocabulary).save_pretrained(folder)


@dataclass
class Watch:
    """The most anonymous memory of each process, by the row that it works at; each row's first process applies it."""

    peaks: dict[str, dict[int, int]] = field(default_factory=dict)

    def look(self, root: psutil.Process) -> None:
        for process in root.children(recursive=True):
            try:
                log = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue  # it has ended
            anonymous = re.search(r"RssAnon:\s+(\d+)", status)  # none once it has ended and nobody has asked how
            if log.suffix == ".log" and anonymous:
                seen = self.peaks.setdefault(log.stem, {})
                seen[process.pid] = max(seen.get(process.pid, 0), 1024 * int(anonymous[1]))

    def applying(self, slug: str) -> int:
        return next(iter(self.peaks[slug].values()))


def run(model: Path, out: Path) -> Watch:
    """A whole run, with as little of scoring and timing as there can be, under the limit."""
    command = [sys.executable, "-m", "effbench.cli", "run", str(model), "--out", str(out), "--device", "cpu"]
    command += ["--techniques", *ROWS, "--tasks", "ref_copying", "--limit", "1", "--threads", "1"]
    command += ["--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--dense-runs", "1"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))

    watch = Watch()
    with subprocess.Popen(command, preexec_fn=limit) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                watch.look(psutil.Process(process.pid))
            time.sleep(0.02)
    return watch


def page(model: Path, records: list[results.Record], watch: Watch) -> str:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    about: dict[str, Any] = machine()
    lines = [
        "# A model that is not held in memory",
        "",
        f"A random Llama of {size / 2e9:.2f} billion weights in bfloat16, {size / 1e9:.2f} GB in files, and a whole "
        f"run over it in which no process may have more than {LIMIT_BYTES / 1e9:.0f} GB of data (`ulimit -d`; mapped "
        "weights count). *anonymous*: the most memory, but for the files' own pages, of the process that applied and "
        "saved the row, looked at 50 times a second.",
        "",
        "| row | status | applying (s) | anonymous (GB) | stored (GB) | compressed share |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for record in records:
        stored, share = record.values.get("stored_bytes"), record.values.get("compressed_share")
        seconds = record.cost.get("seconds")
        cells = [
            f"`{record.pipeline}`",
            record.status + (f": {record.reason}" if record.reason else ""),
            "–" if seconds is None else f"{seconds:.0f}",
            f"{watch.applying(record.slug) / 1e9:.2f}",
            "–" if stored is None else f"{stored / 1e9:.2f}",
            "–" if share is None else f"{share:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"- machine: {about['cpu']} · one thread · torch {torch.__version__}",
        "- made by `python tests/benchmarks/streaming.py FOLDER`",
        "",
    ]
    return "\n".join(lines)


def main(folder: Path) -> int:
    """0 if all is as it should be."""
    model, out = folder / "model", folder / f"run-{os.getpid()}"
    if not model.is_dir():
        write(model)
    watch = run(model, out)
    records, _ = results.load_all(out)
    text = page(model, records, watch)
    print(text)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "README.md").write_text(text, encoding="utf-8")
    status = {record.pipeline.partition(":")[0]: record.status for record in records}
    small = all(
        watch.applying(r.slug) < MOST_ANONYMOUS_BYTES for r in records if r.pipeline.startswith(("rtn", "gptq"))
    )
    return int(not small or status != {"dense": "ok", "rtn": "ok", "gptq": "ok", "bitnet": "out_of_memory"})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
