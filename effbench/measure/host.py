"""What this machine is, and what it can run and measure. `machine` is cheap; `survey` tries things out."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16")
"""Instructions that decide which kernels are fast."""
OPTIONAL = {
    "pynvml": ("nvidia-ml-py", "energy and memory of NVIDIA GPUs"),
    "bitsandbytes": ("bitsandbytes", "techniques of your own on its 8-bit and 4-bit layers"),
    "torchao": ("torchao", "techniques of your own on its quantized tensors"),
    "optimum.quanto": ("optimum-quanto", "techniques of your own on its quantized layers and caches"),
    "accelerate": ("accelerate", "models larger than one device"),
    "datasets": ("datasets", "lm-eval's standard tasks, which fetch their data"),
}
"""Packages that add something: the module, what to install, what for."""


def machine() -> dict[str, Any]:
    """The machine in a few words for a record: processor, cores, memory, GPUs, system. Imports nothing heavy."""
    info = _cpu_info()
    return {
        "cpu": info.get("model name") or info.get("Model") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "flags": [flag for flag in FLAGS if flag in _flags(info)],
        "memory_bytes": _memory_bytes(),
        "gpus": _gpu_names(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def survey(measure: bool = False) -> dict[str, Any]:
    """All that `effbench doctor` tells, section by section.

    Every kernel is tried on a small matrix: its entry is "works" or what it said instead. With `measure` the machine's
    limits are measured and kept, which takes seconds; otherwise those that were kept are told.
    """
    import torch

    from effbench.toolbox.kernels import compiled

    found: dict[str, Any] = {"machine": machine()}
    found["machine"]["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    found["devices"] = ["cpu"]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            found["devices"].append(f"cuda:{number} {torch.cuda.get_device_name(number)}, capability {major}.{minor}")
    found["torch"] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    found["kernels"] = {name: _tried(kernel) for name, kernel in _kernels().items()}
    found["kernels"]["packed codes, compiled"] = compiled.absent() or "works"
    found["kernels"]["torch.compile"] = (
        "works" if shutil.which("gcc") or shutil.which("g++") or shutil.which("clang") else "no C++ compiler"
    )
    found["energy"] = _energy(torch.cuda.is_available())
    found["packages"] = {module: _version(module, name) for module, (name, _) in OPTIONAL.items()}
    found["limits"] = _limits("cuda" if torch.cuda.is_available() else "cpu", measure)
    found["advice"] = _advice(found)
    return found


def _limits(device: str, measure: bool) -> list[dict[str, Any]]:
    from effbench.measure import limits

    for kind in {"cpu", device} if measure else ():
        limits.save(limits.measure(kind), limits.path_of(kind))
    return [asdict(limit) for kind in dict.fromkeys(("cpu", device)) for limit in limits.load(limits.path_of(kind))]


def _kernels() -> dict[str, Any]:
    """Small calls of the kernels that compressed layers use on a CPU."""
    import torch

    def int8_weights() -> None:
        weight = torch.ones(32, 64, dtype=torch.int8)
        torch._weight_int8pack_mm(torch.ones(4, 64, dtype=torch.bfloat16), weight, torch.ones(32, dtype=torch.bfloat16))

    def int4_weights() -> None:
        codes = torch.ones(32, 64, dtype=torch.int32)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.ones(2, 32, 2, dtype=torch.bfloat16)
        torch._weight_int4pack_mm_for_cpu(torch.ones(4, 64, dtype=torch.bfloat16), packed, 32, scales)

    def int8_both() -> None:
        torch._int_mm(torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 32, dtype=torch.int8))

    def bfloat16() -> None:
        torch.ones(32, 64, dtype=torch.bfloat16) @ torch.ones(64, 32, dtype=torch.bfloat16)

    return {
        "bfloat16 product": bfloat16,
        "int8 weights": int8_weights,
        "int4 weights": int4_weights,
        "int8 weights and activations": int8_both,
    }


def _tried(kernel: Any) -> str:
    try:
        kernel()
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as reason:
        return str(reason).partition("\n")[0]
    return "works"


def _energy(gpu: bool) -> dict[str, str]:
    from effbench.measure.counters import meter

    found = {}
    for device in ("cpu", "cuda") if gpu else ("cpu",):
        counter = meter(device)
        found[device] = counter.source or counter.reason
    return found


def _advice(found: dict[str, Any]) -> list[str]:
    """What would make more measurable here."""
    said = []
    cores, load = found["machine"]["cores"], found["machine"]["load"]
    if load is not None and load > 0.5 * cores:
        said.append(f"the load is {load} on {cores} cores: end other work before timing anything")
    if len(found["devices"]) > 1 and found["packages"]["pynvml"] is None:
        said.append("pip install 'effbench[gpu]' for the energy of the GPU")
    if found["machine"]["gpus"] and len(found["devices"]) == 1:
        said.append("there is a GPU that torch does not see: install a torch built for CUDA")
    if "cannot be read" in found["energy"]["cpu"]:
        said.append("let this user read /sys/class/powercap/intel-rapl:*/energy_uj for the energy of the processor")
    flags = found["machine"]["flags"]
    if platform.machine() in ("x86_64", "AMD64") and not {"avx512_bf16", "amx_bf16"} & set(flags):
        said.append("this processor has no bfloat16 arithmetic: compare speeds with --dtype float32 as well")
    return said


def _version(module: str, name: str) -> str | None:
    try:
        return version(name) if find_spec(module) else None
    except PackageNotFoundError:
        return "unknown"
    except ModuleNotFoundError:  # the package above it is missing
        return None


def _cpu_info() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _flags(info: dict[str, str]) -> set[str]:
    return set((info.get("flags") or info.get("Features") or "").split())


@cache
def usable_cores() -> int:
    """The cores that this process may use, or might when that was first asked."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpu_names() -> list[str]:
    """NVIDIA GPUs by name, as the driver lists them; no context is made on any."""
    found: list[str] = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text(errors="replace").splitlines()
        found.extend(line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))
    return found
