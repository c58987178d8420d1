"""Optional packages: whether they are there, and what to say where they are not."""

from __future__ import annotations

from importlib.util import find_spec

from effbench.errors import PackageError


def lacks(package: str, extra: str) -> str | None:
    """Why what needs `package` cannot be done here, as a sentence; `None` if it is installed. It is not imported."""
    try:
        found = find_spec(package) is not None
    except ModuleNotFoundError:  # of a package around it
        found = False
    return None if found else f"the package {package} is not installed; pip install 'effbench[{extra}]'"


def require(package: str, extra: str) -> None:
    """Raises `PackageError` with the sentence of `lacks`."""
    reason = lacks(package, extra)
    if reason is not None:
        raise PackageError(reason)
