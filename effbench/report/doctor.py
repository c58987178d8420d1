"""What `effbench doctor` found, for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from effbench.measure.host import OPTIONAL


def show(found: dict[str, Any], console: Console) -> None:
    """Print a survey of the machine, section by section, advice last."""
    machine, torch = found["machine"], found["torch"]
    memory = f"{machine['memory_bytes'] / 2**30:.1f} GiB of memory" if machine["memory_bytes"] else ""
    said = [f"{machine['cpu']}, {machine['cores']} cores to be used", memory, machine["system"]]
    _section(console, "machine", [(" · ".join(filter(None, said)), "")])
    _section(console, "instructions", [(" ".join(machine["flags"]) or "none that matter here", "")])
    devices = [(device, "") for device in found["devices"]]
    _section(console, "devices", devices if len(devices) > 1 else [*devices, ("no CUDA device", "dim")])
    cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"
    _section(console, "torch", [(f"{torch['version']}, {torch['threads']} threads, {cuda}", "")])
    _section(console, "kernels", [(f"{name}: {state}", _style(state)) for name, state in found["kernels"].items()])
    _section(console, "energy", [(f"{device}: {source}", _style(source)) for device, source in found["energy"].items()])
    packages = []
    for module, installed in found["packages"].items():
        name, purpose = OPTIONAL[module]
        if installed:
            packages.append((f"{name} {installed}", ""))
        else:
            packages.append((f"{name} is not installed; pip install {name} for {purpose}", "dim"))
    _section(console, "packages", packages)
    said = [(line, "") for limit in found["limits"] for line in _limit(limit)]
    _section(console, "limits", said or [("not measured; effbench doctor --measure does, and keeps them", "dim")])
    _section(console, "advice", [(text, "yellow") for text in found["advice"]] or [("nothing to be done", "green")])


def _limit(limit: dict[str, Any]) -> list[str]:
    """What some threads of a device can do."""
    threads = limit["threads"]
    who = limit["device"] if limit["device"] != "cpu" else f"{threads} thread{'s' if threads > 1 else ''}"
    copies = ", ".join(f"{rate / 1e9:.1f} ({size >> 20} MiB)" for size, rate in limit["copy_bytes_per_second"].items())
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limit["operations_per_second"].items())
    load = f", at a load of {limit['load']}" if limit["load"] else ""
    return [
        f"{who}: copies GB/s read and written, by block: {copies}",
        f"{who}: products, 1e9 operations/s: {products} ({limit['measured']}{load})",
    ]


def _style(state: str) -> str:
    return "" if state == "works" or state.startswith(("counter", "integrated")) else "yellow"


def _section(console: Console, name: str, lines: list[tuple[str, str]]) -> None:
    for place, (text, style) in enumerate(lines):
        console.print(Text.assemble((f"{name if place == 0 else '':<14}", "bold"), (text, style)), soft_wrap=True)
