"""The committed rows, by model and pipeline, and what two of them say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effbench import results
from effbench.errors import RecordError
from effbench.measure.derived import nats_difference, same_text
from effbench.results import Record


@dataclass(frozen=True)
class Rows:
    """The rows of one suite, none where it is not measured yet; `ended` are those that came to no figures."""

    name: str
    records: dict[str, Record]
    ended: frozenset[str]

    @classmethod
    def of(cls, folder: Path, name: str) -> Rows:
        """Those under `folder`/`name`."""
        try:
            found = results.load_all(folder / name)[0]
        except RecordError:
            found = []
        fine = {record.pipeline: record for record in found if record.status == "ok"}
        ended = frozenset(record.pipeline for record in found if record.status not in ("ok", "running"))
        return cls(name, fine, ended)

    def joined(self, other: Rows) -> Rows:
        """With those rows of `other` that this has not, if both are of the same weights in the same dtype."""
        mine, theirs = self.get("dense"), other.get("dense")
        if mine is None:
            return other
        if theirs is None or _weights(mine) != _weights(theirs):
            return self
        records = {**other.records, **self.records}
        return Rows(self.name, records, (self.ended | other.ended) - records.keys())

    def get(self, pipeline: str) -> Record | None:
        """The row of this pipeline."""
        return self.records.get(pipeline)

    def without(self, *pipelines: str) -> bool | None:
        """What holds of rows some of which have no figures: nothing yet, or not at all where one has ended so."""
        return False if self.ended.intersection(pipelines) else None

    def above(self, pipeline: str, other: str = "dense", kinds: Sequence[str] = ()) -> tuple[float, float] | None:
        """Nats per token of one row above another and the paired standard error; of some kinds of token, if given."""
        one, two = self.get(pipeline), self.get(other)
        if one is None or two is None or not same_text(one, two):
            return None
        return nats_difference(one, two, *kinds)


def _weights(record: Record) -> tuple[object, object]:
    """What a model was loaded from, and as."""
    return record.provenance.get("inputs", {}).get("weights"), record.settings.get("dtype")
