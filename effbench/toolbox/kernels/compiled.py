"""The kernel for packed codes that a C++ compiler makes of `packed.cpp`, once on each machine.

It is compiled when it is first needed (two seconds), into the user's cache, under a name that tells the source, the
compiler and the processor. Processes that need it at the same time each compile for themselves and put the file in
place at once: there is no lock to wait for, and none that could be left behind. Without a compiler, or where what it
makes does not compute right, there is no kernel and `absent` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effbench.toolbox.kernels.words import STEP, TILE, WIDTHS, pack_masks, pack_words

SOURCE = Path(__file__).with_name("packed.cpp")
COMPILERS = ("c++", "g++", "clang++")
"""What is tried, in this order, unless the variable CXX names one."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native",), ())
"""Flags for this very machine, of which the first that the compiler takes are used."""
COMPILE_SECONDS = 120
"""A compiler that takes longer is given up."""
ROWS, ROWS_WITHOUT_VECTORS = 32, 1
"""Up to so many rows the kernel beats unpacking (2048 x 2048, one thread): with AVX-512 and without."""
INT8_ROWS = 10
"""The same for codes of 8 bits, which it unpacks fast, and for which it has no kernel without AVX-512."""
ALONE = 1 << 17
"""A matrix of fewer weights is not worth a second thread."""
KINDS = {"middle": 0, "codes": 1, "float16": 2, "tiles": 1}
"""How `packed.cpp` calls the ways in which zero points are stored."""


class Kernel:
    """Products with packed codes, and codes unpacked, by a library that was compiled of `packed.cpp`."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        weights = [pointer] * 3 + [count] * 3 + [number] * 3
        self._library.effbench_product.argtypes = [*weights, pointer, count, pointer, number]
        self._library.effbench_unpack.argtypes = [*weights, pointer, number]
        self.vectors = bool(self._library.effbench_vectors())
        self.rows = ROWS if self.vectors else ROWS_WITHOUT_VECTORS
        if self.vectors:
            self._library.effbench_int8_product.argtypes = (
                [pointer] * 3 + [count] * 2 + [pointer, count, pointer, number]
            )
            self._library.effbench_int8_unpack.argtypes = [pointer] * 3 + [count] * 2 + [pointer, number]

    def product(self, x: Tensor, weights: tuple[Any, ...], out_features: int) -> Tensor:
        """`x` (rows, in) times the transposed weights, in bfloat16; `weights` are what `weights` gives."""
        y = torch.empty(x.shape[0], out_features, dtype=torch.bfloat16)
        threads = self._threads(x.shape[1] * out_features)
        self._library.effbench_product(*weights, x.data_ptr(), x.shape[0], y.data_ptr(), threads)
        return y

    def unpacked(self, weights: tuple[Any, ...], out_features: int, in_features: int) -> Tensor:
        """The weights (out, in) in bfloat16."""
        y = torch.empty(out_features, in_features, dtype=torch.bfloat16)
        self._library.effbench_unpack(*weights, y.data_ptr(), self._threads(y.numel()))
        return y

    def int8_product(self, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """`x` (rows, in) times the transpose of scales * (codes - zeros), in bfloat16, with `vectors` only.

        `codes` (out, in) are int8, `scales` and `zeros` (out,) float32.
        """
        (out_features, in_features), place = codes.shape, codes.data_ptr()
        y = torch.empty(x.shape[0], out_features, dtype=torch.bfloat16)
        weights = place, scales.data_ptr(), zeros.data_ptr(), in_features, out_features
        self._library.effbench_int8_product(
            *weights, x.data_ptr(), x.shape[0], y.data_ptr(), self._threads(codes.numel())
        )
        return y

    def int8_unpacked(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """scales * (codes - zeros) (out, in) in bfloat16, with `vectors` only."""
        (out_features, in_features), place = codes.shape, codes.data_ptr()
        y = torch.empty(out_features, in_features, dtype=torch.bfloat16)
        weights = place, scales.data_ptr(), zeros.data_ptr(), in_features, out_features
        self._library.effbench_int8_unpack(*weights, y.data_ptr(), self._threads(codes.numel()))
        return y

    @staticmethod
    def _threads(weights: int) -> int:
        return 1 if weights < ALONE else torch.get_num_threads()


def weights(
    codes: Tensor,
    grids: Tensor,
    zeros: Tensor | None,
    shape: tuple[int, int],
    groups: int,
    bits: int,
    tile: int,
    kind: str,
) -> tuple[Any, ...]:
    """What tells the kernel of a matrix (out, in): `kind` is how its zero points are stored."""
    out_features, in_features = shape
    place = None if zeros is None else zeros.data_ptr()
    sizes = in_features, out_features, in_features // groups
    return codes.data_ptr(), grids.data_ptr(), place, *sizes, bits, tile, KINDS[kind]


_OFF: list[None] = []


@contextmanager
def switched_off() -> Iterator[None]:
    """As if there were no compiler here while the context is open."""
    _OFF.append(None)
    try:
        yield
    finally:
        _OFF.pop()


def kernel() -> Kernel | None:
    """The kernel of this machine, compiled if need be; `None` where there is none."""
    return None if _OFF else _built()[0]


def absent() -> str | None:
    """Why there is no kernel; `None` if there is one."""
    return "it is switched off" if _OFF else _built()[1]


@cache
def _built() -> tuple[Kernel | None, str | None]:
    if os.name != "posix":
        return None, f"on {platform.system()} it is not compiled"
    found, wanted = _compiler(), os.environ.get("CXX")
    if found is None:
        return None, f"no C++ compiler {wanted} was found" if wanted else "no C++ compiler was found"
    said = "it was not compiled"
    for flags in MACHINE_FLAGS:
        try:
            made = _load(found, [*FLAGS, *flags])
        except subprocess.CalledProcessError as reason:
            said = f"{Path(found).name} said: {str(reason.stderr).strip().partition(chr(10))[0]}"
            continue
        except (OSError, subprocess.TimeoutExpired) as reason:
            return None, f"compiling it failed: {reason}"
        return (made, None) if _computes(made) else (None, f"what {Path(found).name} made of it computes wrong")
    return None, said


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return next((path for name in ([wanted] if wanted else COMPILERS) if (path := shutil.which(name))), None)


def _load(compiler: str, flags: list[str]) -> Kernel:
    """The library from the cache, or newly compiled and put there; where that cannot be written, used without."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS).stdout
    content = "\n".join([SOURCE.read_text(), compiler, version, *flags, platform.machine(), _processor()])
    name = f"packed-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "effbench"
    if (folder / name).is_file():
        return Kernel(folder / name)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / name
        command = [compiler, *flags, "-o", str(file), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
                copy.write(file.read_bytes())
            os.replace(copy.name, folder / name)  # at once: nobody sees half of it
        except OSError:
            return Kernel(file)
    return Kernel(folder / name)


def _processor() -> str:
    """What tells one processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _computes(made: Kernel) -> bool:
    """Whether a product and unpacked weights are what they should be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2 * STEP, generator=generator).bfloat16()
    for bits in WIDTHS:
        codes = torch.randint(0, 2**bits, (2 * TILE, 2 * STEP), dtype=torch.uint8, generator=generator)
        zeros = torch.randint(0, 2**bits, (2, 2 * TILE), dtype=torch.uint8, generator=generator)
        scales = torch.rand(2, 2 * TILE, generator=generator).half()
        steps = codes.float().view(-1, 2, STEP) - zeros.T.unsqueeze(-1)
        exact = (steps * scales.float().T.unsqueeze(-1)).flatten(1)
        packed, masks = pack_words(codes, bits), pack_masks(zeros, bits)
        told = weights(packed, scales, masks, (2 * TILE, 2 * STEP), 2, bits, TILE, "codes")
        found = made.product(x, told, 2 * TILE).float()
        right = (found - x.float() @ exact.T).norm() <= 0.01 * found.norm()
        if not right or not torch.equal(made.unpacked(told, 2 * TILE, 2 * STEP), exact.bfloat16()):
            return False
    return True
