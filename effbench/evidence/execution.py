"""How fast packed weights are multiplied: a wide block, dense and packed in every way, in turn in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from effbench.evidence.table import NOT_YET, Line, Table, number

RECORD = "execution.json"
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
ROWS = (1, 8, 32, 128, 512)
THREADS = (1, 2)
ROUNDS = 5
COPY_BYTES = 2**28
DENSE, OFF = "bfloat16", "without a compiler: "
PIPELINES = {
    "int8": "rtn:bits=8",
    "int4": "rtn:bits=4",
    "int4, groups of 64": "rtn:bits=4,group_size=64",
    "3 bits": "rtn:bits=3",
    "3 bits, groups of 64": "rtn:bits=3,group_size=64",
    "2 bits": "rtn:bits=2",
    "2 bits, groups of 64": "rtn:bits=2,group_size=64",
    "nf4": "nf4",
}
WHOLE = "int8, inputs too"
"""Int8 weights and inputs, as `smoothquant` stores and multiplies them."""
WITHOUT = ("int4", "3 bits", "2 bits")
"""What is timed without the compiled kernel, too."""
ASKED = {
    "int8": {1: 1.8},
    WHOLE: {128: 1.3},
    "int4": {1: 3.0, 128: 0.55, 512: 0.75},
    "int4, groups of 64": {1: 3.0, 128: 0.55, 512: 0.75},
    "3 bits": {1: 0.9},
    "3 bits, groups of 64": {1: 0.9},
    "2 bits": {1: 0.9},
    "2 bits, groups of 64": {1: 0.9},
}
"""By how much, at so many rows, a block has to be faster than the dense one, or may be slower."""


def block() -> Any:
    """A Llama of one block with random weights in bfloat16, and next to nothing around it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=2048, **SIZES)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def blocks() -> dict[str, Any]:
    """The block, dense and packed in each way; what needs a package that is not here is left out."""
    from effbench.registry import parse
    from effbench.technique import LayerTechnique
    from effbench.toolbox.extras import lacks
    from effbench.toolbox.int8 import Int8Linear
    from effbench.toolbox.walk import compress_blocks

    found = {DENSE: block(), WHOLE: block()}
    compress_blocks(found[WHOLE], lambda linear, _: Int8Linear.pack(linear), None)
    for kind, pipeline in PIPELINES.items():
        if kind == "nf4" and lacks("bitsandbytes", "bitsandbytes"):
            continue
        found[kind] = block()
        technique = parse(pipeline)[0]
        assert isinstance(technique, LayerTechnique)
        compress_blocks(found[kind], technique.layer, None)
    return found


def measure(folder: Path) -> None:
    """Write the seconds to `folder`, unless they are there already."""
    if not (folder / RECORD).is_file():
        text = json.dumps(times(ROUNDS, ROWS, THREADS))
        (folder / RECORD).write_text(text.replace("}, ", "},\n") + "\n", encoding="utf-8")


def times(rounds: int, rows: tuple[int, ...], threads: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of a pass by threads, kind and rows, round by round, with what is needed to read them."""
    import torch

    from effbench.measure import host
    from effbench.measure.memory import module_bytes
    from effbench.toolbox.kernels import compiled

    made = blocks()
    found: dict[str, Any] = {
        "machine": host.machine(),
        "torch": torch.__version__,
        "kernel": compiled.absent() or "compiled",
        "weight_bytes": {kind: module_bytes(model.model.layers) for kind, model in made.items()},
        "copy_bytes_per_second": {},
        "seconds": {},
    }
    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        found["copy_bytes_per_second"][str(count)] = _copy_bandwidth()
        found["seconds"][str(count)] = _seconds(made, rounds, rows, compiled.switched_off)
    torch.set_num_threads(before)
    return found


def _copy_bandwidth() -> float:
    """Bytes read and written a second by a copy too large for any cache, the best of ten."""
    import torch

    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / min(times)


def _seconds(
    made: dict[str, Any], rounds: int, rows: tuple[int, ...], off: Callable[[], AbstractContextManager[None]]
) -> dict[str, dict[str, list[float]]]:
    import torch

    turns: list[tuple[str, Any, Callable[[], AbstractContextManager[None]]]]
    turns = [(kind, model, nullcontext) for kind, model in made.items()]
    turns += [(OFF + kind, made[kind], off) for kind in WITHOUT]
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind, _, _ in turns}
    for count in rows:
        x = torch.randn(1, count, SIZES["hidden_size"], dtype=torch.bfloat16)
        for turn in range(rounds + 1):
            for kind, model, context in turns:
                with torch.inference_mode(), context():
                    start = time.perf_counter()
                    model.model(inputs_embeds=x, use_cache=False)
                    spent = time.perf_counter() - start
                if turn:  # the first warms up
                    found[kind].setdefault(str(count), []).append(spent)
    return found


def table(folder: Path) -> Table:
    """How many times as fast as the dense block each is."""
    path = folder / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    kinds = [*ASKED, "nf4", *(OFF + kind for kind in WITHOUT)]
    lines = [_line(known, kind, threads) for kind in kinds for threads in THREADS]
    after = [
        "a Llama's block with random weights, "
        + ", ".join(f"{name.removeprefix('num_').replace('_', ' ')} {value:,}" for name, value in SIZES.items())
        + f"; median of the ratios of {ROUNDS} rounds in turn, in one process",
        "bold: what is asked at that number of rows; `int8, inputs too` is `smoothquant`, all others round weights "
        "only, one scale a row unless groups are named",
        "GB/s: the bytes that the packed block stores, over the time of one row; copy: that as a share of what a copy "
        "reads and writes a second here, with as many threads",
    ]
    if known is not None:
        machine = known["machine"]
        copies = " and ".join(f"{speed / 1e9:.1f}" for speed in known["copy_bytes_per_second"].values())
        dense = known["seconds"]["1"][DENSE]
        spent = ", ".join(f"{1e3 * median(dense[str(rows)]):.2f} ms for {rows}" for rows in ROWS)
        after.insert(
            0,
            f"machine: {machine['cpu']}, {machine['cores']} cores, {', '.join(machine['flags'])}; torch "
            f"{known['torch']}; kernel for packed codes: {known['kernel']}; a copy moves {copies} GB/s with 1 and 2 "
            f"threads; the dense block takes {spent} rows with one thread",
        )
    return Table(
        "Packed weights are fast where it matters",
        f"How many times as fast as in {DENSE} a block of a language model is with packed weights, by the number of "
        "rows: 1 is decoding, many are a prompt.",
        ("weights", "threads", *(f"{rows} {'rows' if rows > 1 else 'row'}" for rows in ROWS), "GB/s", "copy"),
        lines,
        after=after,
    )


def _line(known: dict[str, Any] | None, kind: str, threads: int) -> Line:
    asked = ASKED.get(kind, {})
    if known is None or kind not in known["seconds"].get(str(threads), {}):
        return Line([kind, str(threads), *[NOT_YET] * (len(ROWS) + 2)], claims=bool(asked))
    seconds = known["seconds"][str(threads)]
    cells, fits = [kind, str(threads)], []
    for rows in ROWS:
        both = zip(seconds[DENSE][str(rows)], seconds[kind][str(rows)], strict=True)
        ratio = median(dense / own for dense, own in both)
        cells.append(f"**{number(ratio, 2)}**" if rows in asked else number(ratio, 2))
        fits.append(ratio >= asked.get(rows, 0))
    speed = known["weight_bytes"][kind.removeprefix(OFF)] / median(seconds[kind]["1"])
    cells += [number(speed / 1e9, 1), f"{100 * speed / known['copy_bytes_per_second'][str(threads)]:.0f} %"]
    return Line(cells, all(fits) if asked else None, claims=bool(asked))
