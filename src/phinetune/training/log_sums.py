"""Keeps in a checkpoint what has been added up since the last logged line, so a resumed run logs the same means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LogSums:
    """What one process of a run has added up.

    Attributes:
        loss: the losses of the steps since the last logged one.
        since: the last logged step.
        metrics: the objective's numbers since then, by name.
        skipped: all steps of the run that were skipped since they were not finite.
    """

    loss: float
    since: int
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)

    def write(self, checkpoint: Path, process: int) -> None:
        """Write the sums of a process into a checkpoint that is being made."""
        _file(checkpoint, process).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path, process: int) -> LogSums | None:
        """The sums in a checkpoint; None if it has none: an older version wrote it, or there were fewer processes."""
        try:
            return cls(**json.loads(_file(checkpoint, process).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def _file(checkpoint: Path, process: int) -> Path:
    return checkpoint / f"log_sums_{process}.json"
