"""What compressed weights give on a GPU: measured and written to results/<its name> by one command.

python -m effbench.report.gpu

Products of packed weights alone, where a GPU graph replays them so that nothing but the GPU is timed; and rows of a
small model and of a random Llama of a billion parameters, with their energy, where all that a user would wait for is.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from effbench import results
from effbench.measure import limits
from effbench.measure.derived import Row, rows
from effbench.measure.limits import Limits
from effbench.report.machine import limit_lines, make_model
from effbench.report.markdown import markdown
from effbench.report.table import VIEWS, View

if TYPE_CHECKING:
    import torch
    from torch import nn

MODELS = {"ref-3m": "ref-3m", "random-llama-1b": str(Path("runs") / "random-llama-1b")}
"""Folders of the records, and their models."""
TECHNIQUES = ("rtn:bits=8", "rtn:bits=4,group_size=64", "nf4")
LAYERS = (*TECHNIQUES, "rtn:bits=3,group_size=64", "rtn:bits=2,group_size=64", "smoothquant", "bitnet")
"""Whose layers are timed alone."""
SIDE, BATCHES = 4096, (1, 8, 64, 512)
"""Of the matrix that is timed alone, and the rows that it is multiplied with."""
COPIES = 8
"""Of each matrix, multiplied in turns, so that none is found in a cache."""
ROUNDS = 9
ENERGIES = ("prefill_joules_per_token", "decode_joules_per_token", "joules_per_token")
SHOWN = ("nll_difference", "prefill_speedup", "decode_speedup", "decode_seconds_per_token", "stored_bytes")
MORE = (View("peak_device_bytes", 6), View("idle_watts", 0), View("decode_roofline_share", 0))


def page(folder: Path) -> str:
    """The tables of a folder that `main` filled."""
    found = json.loads((folder / "products.json").read_text(encoding="utf-8"))
    said = [f"# {found['device']}", "", f"Written by `{(__doc__ or '').split(chr(10))[2]}`.", ""]
    said += [*limit_lines([Limits.of(content) for content in found["limits"]]), ""]
    said += _products(found)
    views = [*(view for view in VIEWS if view.name in SHOWN), *MORE]
    for name in MODELS:
        if (folder / name).is_dir():
            records, _ = results.load_all(folder / name)
            said += [markdown(rows(records), views), *_energy(rows(records)), ""]
    return "\n".join(said)


def _products(found: dict[str, Any]) -> list[str]:
    """How many times as fast as that of bfloat16 each product is."""
    times = found["seconds"]
    batches = list(times["dense"])
    lines = [
        f"A matrix of {SIDE} x {SIDE}, times so many rows: the time of bfloat16, and how many times as fast the packed "
        f"one is (medians of {ROUNDS} rounds, interleaved).",
        "",
        "| weights | " + " | ".join(f"{rows} rows" if rows != "1" else "1 row" for rows in batches) + " |",
        "|---|" + "---:|" * len(batches),
        "| dense (us) | " + " | ".join(f"{1e6 * median(times['dense'][rows]):.1f}" for rows in batches) + " |",
    ]
    for name, measured in times.items():
        if name != "dense":
            ratios = [median(times["dense"][rows]) / median(measured[rows]) for rows in batches]
            lines.append(f"| `{name}` | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return [*lines, "", *(f"- {line}" for line in found["notes"]), ""]


def _energy(found: list[Row]) -> list[str]:
    """Joules above idle, each with the half width of its 95 % interval over the windows."""
    from scipy.stats import t

    source = found[0].record.provenance.get("energy", {}).get("source", "none")
    whys = {row.record.missing.get(name, "") for row in found for name in ENERGIES}
    if len(whys) == 1 and "" not in whys:
        return ["", f"Energy was not measured: {whys.pop()}."]
    lines = [
        "",
        f"Energy above idle ({source}), millijoules a token, with the half of a 95 % interval over the windows:",
        "",
        "| pipeline | " + " | ".join(name.removesuffix("_joules_per_token") for name in ENERGIES) + " |",
        "|---|" + "---:|" * len(ENERGIES),
    ]
    for row in found:
        cells = []
        for name in ENERGIES:
            values = row.record.samples.get(name, [])
            if row.values.get(name) is None or len(values) < 2:
                cells.append(f"— ({row.record.missing.get(name, row.record.status)})")
                continue
            half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
            cells.append(f"{1e3 * mean(values):.3f} ± {half / mean(values):.1%}")
        lines.append(f"| `{row.record.pipeline}` | " + " | ".join(cells) + " |")
    return lines


def products() -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """Seconds of one product by layer and rows, interleaved; and what had to be left out."""
    from effbench.errors import EffbenchError

    layers, notes = {"dense": _dense()}, []
    for name in LAYERS:
        try:
            layers[name] = _packed(name)
        except (EffbenchError, RuntimeError) as reason:
            notes.append(f"`{name}`: {reason}")
    graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
    for name, copies in layers.items():
        for count in BATCHES:
            try:
                graphs[name, count] = _captured(copies, count)
            except RuntimeError as reason:
                notes.append(f"`{name}` times {count} rows is not one piece of work for the GPU: {str(reason)[:80]}")
    names = [name for name in layers if all((name, count) in graphs for count in BATCHES)]
    seconds: dict[str, dict[str, list[float]]] = {name: {str(rows): [] for rows in BATCHES} for name in names}
    for _ in range(ROUNDS):
        for count in BATCHES:
            for name in names:
                seconds[name][str(count)].append(_replayed(graphs[name, count]) / COPIES)
    return seconds, notes


def _dense() -> list[nn.Module]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return [nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16, device="cuda") for _ in range(COPIES)]


def _packed(name: str) -> list[nn.Module]:
    """As many layers as the technique makes of the first that `_dense` gives."""
    from copy import deepcopy

    import torch

    from effbench.registry import parse
    from effbench.toolbox.int8 import Int8Linear
    from effbench.toolbox.ternary import TernaryLinear

    linear: Any = _dense()[0]
    if name == "bitnet":
        layer: nn.Module = TernaryLinear.pack(linear.weight, None, "2", torch.bfloat16).cuda()
    elif name == "smoothquant":
        layer = Int8Linear.pack(linear).cuda()
    else:
        technique: Any = parse(name)[0]
        layer = technique.layer(linear, None)
    return [layer, *(deepcopy(layer) for _ in range(COPIES - 1))]


def _captured(copies: list[nn.Module], count: int) -> torch.cuda.CUDAGraph:
    """The products of all copies with so many rows, as a graph."""
    import torch

    x = torch.randn(count, SIDE, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        for layer in copies[:1] * 3:
            layer(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for layer in copies:
                layer(x)
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, times: int = 10) -> float:
    """Seconds of one replay."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def main() -> None:
    """Measure, and write limits, products, records and the page."""
    import torch

    from effbench import harness
    from effbench.suite import Suite

    with get_context("spawn").Pool(1) as apart:  # a process that holds the GPU would have the rows' energy refused
        name = apart.apply(torch.cuda.get_device_name)
        found, (seconds, notes) = apart.apply(limits.measure, ["cuda"]), apart.apply(products)
    folder = Path("results") / re.sub(r"[^a-z0-9]+", "-", name.lower())
    shutil.rmtree(folder, ignore_errors=True)
    limits.save(found, limits.path_of("cuda"))
    content = {
        "device": name,
        "torch": torch.__version__,
        "limits": [asdict(limit) for limit in found],
        "seconds": seconds,
        "notes": notes,
    }
    results.write_atomically(folder / "products.json", json.dumps(content, indent=1) + "\n")
    if not (Path(MODELS["random-llama-1b"]) / "config.json").is_file():
        make_model(Path(MODELS["random-llama-1b"]), width=2048, layers=20)
    for where, model in MODELS.items():
        asked = Suite(
            "gpu", model, TECHNIQUES, device="cuda", rounds=5, dense_runs=1, threads=4, limit=50, new_tokens=32
        )
        harness.run(asked, folder / where)
        results.write_atomically(folder / "README.md", page(folder))


if __name__ == "__main__":
    main()
