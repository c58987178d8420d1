"""stub, replaced"""
from typing import Any


def machine() -> dict[str, Any]:
    return {}
