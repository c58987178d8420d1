"""Weights that stay on disk until they are looked at, each mapped by itself.

The format's own loader maps a whole file, whose pages stay resident as long as any tensor of it lives, beside all that
is made of the others. Here a matrix that is replaced gives its pages back, and what is read can be dropped by the
system and read again, so that a model may be larger than memory while it is compressed block by block.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from effbench.store import DTYPES, read_tensors

LEAST_BYTES = 1 << 20
"""Smaller tensors are read: a mapping takes whole pages and a system call."""


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file: large ones mapped, small ones in memory of their own.

    What is written to a mapped tensor stays in memory and never reaches the file.
    """
    for name, tensor in read_tensors(path, most_bytes=LEAST_BYTES):
        yield name, tensor
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + length + place for place in entry["data_offsets"])
            if end - start <= LEAST_BYTES:
                continue
            before = start % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(file.fileno(), end - start + before, access=mmap.ACCESS_COPY, offset=start - before)
            dtype = DTYPES[entry["dtype"]]
            flat = torch.frombuffer(pages, dtype=dtype, offset=before, count=(end - start) // dtype.itemsize)
            yield name, flat.view(entry["shape"])


def keep_on_disk(model: Any, folder: Path) -> None:
    """Let a model's parameters be what lies in a checkpoint's files, wherever they are just that."""
    parameters = dict(model.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in tensors(path):
            loaded = parameters.get(name)
            if loaded is None or (loaded.dtype, loaded.shape) != (tensor.dtype, tensor.shape):
                continue  # it was converted, and is in memory of its own
            ends = [(t.flatten()[0], t.flatten()[-1]) for t in (loaded.detach(), tensor)]
            if ends[0] == ends[1]:
                loaded.data = tensor
