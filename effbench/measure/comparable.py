"""Whether two rows may be subtracted from each other: the same code, weights, text, machine and threads."""

from __future__ import annotations

from effbench.results import Record

MACHINE = ("cpu", "cores", "gpus", "memory_bytes")
"""What makes another machine; its kernel and its flags may change under a run."""


def incomparable(one: Record, other: Record) -> str:
    """Why figures of one row may not be subtracted from those of the other, "" where they may.

    What a record does not say is taken to be the same.
    """
    ours, theirs = one.provenance, other.provenance
    for name, what in (("model_hash", "other weights"), ("data_hash", "another text"), ("code", "other code")):
        if differs(ours.get(name), theirs.get(name)):
            dirty = name == "code" and (ours.get("dirty") or theirs.get("dirty"))
            return f"the dense row was measured with {what}{', from a checkout with changes' if dirty else ''}"
    if differs(one.settings.get("threads"), other.settings.get("threads")):
        return f"the dense row was measured with {other.settings['threads']} threads"
    said = other_machine(one, other)
    return f"the dense row was measured on another machine ({said})" if said else ""


def other_machine(one: Record, other: Record) -> str:
    """What the machine of the other has that this one's has not, "" for the same machine."""
    here, there = (record.provenance.get("machine") or {} for record in (one, other))
    changed = [name for name in MACHINE if differs(here.get(name), there.get(name))]
    return ", ".join(f"{name.removesuffix('_bytes')} {there[name]}" for name in changed)


def differs(one: object, other: object) -> bool:
    """Whether both are known and not the same."""
    return one is not None and other is not None and one != other
