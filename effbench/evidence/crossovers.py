"""From which sparsity on, and up to how many rows, a sparse product beats the dense one on this machine's CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from effbench.evidence.table import NOT_YET, Line, Table, number

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "sparse_kernels.json"
WIDTH, MATRICES, ROUNDS = 2048, 6, 9
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
ROWS = (1, 8, 32, 128)
KINDS = ("bitmask", "2:4", "csr", "csr, filled in")
"""How the weights are stored and multiplied: all fill in the zeros and drop them again, but for "csr"."""


def measure(folder: Path) -> None:
    """Write the milliseconds to `folder`, unless they are there already."""
    if (folder / RECORD).is_file():
        return
    import torch

    torch.set_num_threads(1)
    found = {str(sparsity): times(sparsity) for sparsity in SPARSITIES}
    about = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    text = json.dumps({**about, "milliseconds": found})
    (folder / RECORD).write_text(text.replace("}, ", "},\n") + "\n", encoding="utf-8")


def times(sparsity: float) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a product by kind and number of rows, round by round; six matrices take turns."""
    import torch
    from torch import nn

    from effbench.toolbox.sparse import lowest, pruned

    torch.manual_seed(0)
    layers: dict[str, list[nn.Module]] = {kind: [] for kind in ("dense", *KINDS)}
    for _ in range(MATRICES):
        weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
        gone = lowest(torch.rand(WIDTH, WIDTH), sparsity, "2:4" if sparsity == 0.5 else "unstructured")
        for kind, some in layers.items():
            if kind == "2:4" and sparsity != 0.5:
                continue
            linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            some.append(pruned(linear, gone, kind.partition(",")[0]))
    milliseconds: dict[str, dict[str, list[float]]] = {kind: {} for kind, some in layers.items() if some}
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, WIDTH, dtype=torch.bfloat16)
            for turn in range(ROUNDS + 2):
                for kind, times in milliseconds.items():
                    start = time.perf_counter()
                    for layer in layers[kind]:
                        _product(kind, layer, x)
                    if turn > 1:
                        spent = 1e3 * (time.perf_counter() - start) / MATRICES
                        times.setdefault(str(rows), []).append(round(spent, 4))
    return milliseconds


def _product(kind: str, layer: Any, x: Tensor) -> Tensor:
    """Of a kind of layer, the product that its name says, whichever the layer itself would choose."""
    by = {"dense": "forward", "csr": "sparse_product"}.get(kind, "filled_in_product")
    product: Tensor = getattr(layer, by)(x)
    return product


def table(folder: Path) -> Table:
    """How many times as fast as the dense product each is."""
    path = folder / RECORD
    known = json.loads(path.read_text(encoding="utf-8"))["milliseconds"] if path.is_file() else {}
    lines = []
    for kind in KINDS:
        for sparsity in SPARSITIES if kind != "2:4" else (0.5,):
            times = known.get(str(sparsity), {})
            cells = [kind, f"{100 * sparsity:g} %"]
            for rows in ROWS:
                if kind not in times:
                    cells.append(NOT_YET)
                    continue
                both = zip(times["dense"][str(rows)], times[kind][str(rows)], strict=True)
                faster = median(dense / own for dense, own in both)
                cells.append(f"**{number(faster, 2)}**" if faster > 1 else number(faster, 2))
            lines.append(Line(cells, claims=False))
    dense = known.get(str(SPARSITIES[0]), {}).get("dense", {})
    shown = [number(median(dense[str(rows)]), 2) if dense else NOT_YET for rows in ROWS]
    lines.insert(0, Line(["dense, ms", "", *shown], claims=False))
    return Table(
        "Sparse products on a CPU",
        f"How many times as fast as the dense bfloat16 product a {WIDTH} x {WIDTH} matrix is with its zeros left out, "
        "by the number of rows that it is multiplied with; bold where it wins.",
        ("stored as", "zeros", *(f"{rows} {'rows' if rows > 1 else 'row'}" for rows in ROWS)),
        lines,
        after=(
            f"median of {ROUNDS} rounds in turn, {MATRICES} matrices in turn, one thread",
            "`csr` is torch's sparse product; all others fill in the zeros for a product and drop them after it. A "
            "layer stored as CSR takes the faster of its two ways (`effbench.toolbox.sparse`)",
            "torch has no product for a bitmask or for 2:4 on a CPU: what they save is memory. 2:4 on a GPU goes "
            "through torch's semi-structured tensors",
        ),
    )
