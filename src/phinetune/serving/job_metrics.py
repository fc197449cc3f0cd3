"""A job's metrics, out of its run's metrics.jsonl: for events, checkpoints and the result file."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
# The API's names, and those of metrics.jsonl. An evaluation scores all of the validation file.
TRAIN = {"train_loss": "loss", "train_mean_token_accuracy": "token_accuracy"}
VALID = {
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_token_accuracy",
    "full_valid_loss": "eval_loss",
    "full_valid_mean_token_accuracy": "eval_token_accuracy",
}
Entry = dict[str, Any]


def read_entries(path: Path) -> list[Entry]:
    """All whole lines of metrics.jsonl."""
    try:
        return _parsed(path.read_bytes())[0]
    except OSError:
        return []


@dataclass
class Tail:
    """Reads what a metrics.jsonl has got since the last look. A resumed run writes the file anew; then all is read."""

    path: Path
    _inode: int = 0
    _offset: int = 0
    _seen: list[tuple[int, float]] = field(default_factory=list)

    def new(self) -> list[Entry]:
        """The whole lines since the last look."""
        try:
            with self.path.open("rb") as file:
                inode = self.path.stat().st_ino
                if inode != self._inode:
                    self._inode, self._offset, self._seen = inode, 0, []
                file.seek(self._offset)
                entries, read = _parsed(file.read())
        except OSError:
            return []
        self._offset += read
        self._seen += [(one["step"], one["time"]) for one in entries if "loss" in one and "time" in one]
        self._seen = [self._seen[0], *self._seen[-50:]][:51] if self._seen else []
        return entries

    def finish(self, steps: int) -> int | None:
        """When the last step will be done, in seconds since 1970, at the pace of the last steps."""
        recent = self._seen[-50:]
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None
        pace = (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])
        return math.ceil(recent[-1][1] + pace * max(0, steps - recent[-1][0]))


def _parsed(text: bytes) -> tuple[list[Entry], int]:
    """The entries of whole lines, and the bytes of these lines."""
    end = text.rfind(b"\n") + 1
    found = []
    for line in text[:end].splitlines():
        try:
            entry = json.loads(line)
            if isinstance(entry.get("step"), int):
                found.append(entry)
        except (ValueError, AttributeError):
            continue
    return found, end


def shown(entry: Entry) -> dict[str, Any]:
    """An entry with the API's names; only numbers that are there."""
    names = TRAIN if "loss" in entry else VALID
    return {"step": entry["step"], **{name: entry[key] for name, key in names.items() if _is_number(entry.get(key))}}


def at_step(entries: Iterable[Entry], step: int) -> dict[str, Any]:
    """All numbers of a step."""
    found: dict[str, Any] = {"step": step}
    for entry in entries:
        if entry["step"] == step:
            found |= shown(entry)
    return found


def told(entry: Entry, steps: int | None) -> str:
    """An entry as an event's message."""
    place = f"Step {entry['step']}" + (f"/{steps}" if steps else "")
    if "loss" in entry:
        return f"{place}: training loss={_spelled(entry['loss'])}"
    return f"{place}: full validation loss={_spelled(entry.get('eval_loss'))}"


def as_csv(entries: Sequence[Entry]) -> str:
    """The result file: a line for each step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in sorted({entry["step"] for entry in entries if {"loss", "eval_loss"} & entry.keys()}):
        numbers = at_step([entry for entry in entries if entry["step"] == step], step)
        numbers["train_accuracy"] = numbers.get("train_mean_token_accuracy", "")
        writer.writerow([numbers.get(column, "") for column in COLUMNS])
    return text.getvalue()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _spelled(value: Any) -> str:
    return f"{value:.4f}" if _is_number(value) else "not a number"
