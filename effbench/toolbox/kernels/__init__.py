"""Layouts of packed codes, and the kernels that multiply them."""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def of_gpus() -> ModuleType | None:
    """The kernels of GPUs, `kernels.gpu`; `None` without Triton."""
    try:
        from effbench.toolbox.kernels import gpu
    except ImportError:
        return None
    return gpu
