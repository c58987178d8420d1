"""The committed rows, by model and pipeline, and what two of them say together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effbench import results
from effbench.errors import RecordError
from effbench.measure.derived import nats_difference, same_text
from effbench.results import Record


@dataclass(frozen=True)
class Rows:
    """The finished rows of one suite; none where it is not measured yet."""

    name: str
    records: dict[str, Record]

    @classmethod
    def of(cls, folder: Path, name: str) -> Rows:
        """Those under `folder`/`name`."""
        try:
            found = results.load_all(folder / name)[0]
        except RecordError:
            found = []
        return cls(name, {record.pipeline: record for record in found if record.status == "ok"})

    def get(self, pipeline: str) -> Record | None:
        """The row of this pipeline."""
        return self.records.get(pipeline)

    def above(self, pipeline: str, other: str = "dense", kind: str = "") -> tuple[float, float] | None:
        """Nats per token of one row above another and the paired standard error; of one kind of token, if given."""
        one, two = self.get(pipeline), self.get(other)
        if one is None or two is None or not same_text(one, two):
            return None
        return nats_difference(one, two, kind)
