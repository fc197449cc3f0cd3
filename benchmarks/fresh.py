"""Measurements in fresh processes, and the rows that several benchmarks train on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.store import HERE, Row

SHARED = HERE.parents[1] / "shared"
SHAPE = "random:{layers: 4}"  # Phi-3 mini's, four layers of it

PATIENCE = 5400  # seconds a measurement; the longest are an epoch of TRL, and a row of 131,072 tokens
COMPILING = 480  # where torch.compile is tried: it may compile for longer than the run is long


class Deadline:
    """A moment that no measurement may pass; none is begun after it."""

    def __init__(self, seconds: float = float("inf")) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


NO_DEADLINE = Deadline()


def measure(kind: str, deadline: Deadline = NO_DEADLINE, **options: Any) -> Row:
    """One measurement in a fresh process; a peer that fails or takes too long gives a line in place of numbers."""
    command = [sys.executable, "-m", "benchmarks.worker", kind, json.dumps(options)]
    compiles = options.get("compile") or "compiled" in (options.get("engine"), *options.get("engines", ()))
    patience = min(COMPILING if compiles else PATIENCE, deadline.left)
    if patience <= 0:
        return {"failed": "left out: the time was over"}
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {patience / 60:.1f} minutes"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    if "tokens" in row:
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
    return row


def alpaca_rows() -> str:
    """The benchmark's rows: those beside the repository, else the demo's in the same form."""
    there = SHARED / "data" / "alpaca_en_demo.json"
    if there.is_file():
        return str(there)
    made = [
        {"instruction": m[-2]["content"], "input": "", "output": m[-1]["content"]} for m in demo_chats() if len(m) >= 2
    ]
    return saved_rows(made)


def demo_chats() -> list[list[dict[str, str]]]:
    """The messages of the demo's chats to train on."""
    demo = HERE.parent / "src" / "phinetune" / "demo_data" / "train.jsonl"
    return [json.loads(line)["messages"] for line in demo.read_text().splitlines()]


def saved_rows(rows: list[Row]) -> str:
    """A JSON file of these rows."""
    file = Path(tempfile.mkdtemp()) / "rows.json"
    file.write_text(json.dumps(rows))
    return str(file)


def short_chats(count: int) -> str:
    """A JSON file of `count` made-up rows of about 96 of the starter's tokens each, none the same as another."""
    words = ["river", "garden", "seven", "paper", "winter", "music", "stone", "letter", "green", "market", "bread"]

    def some(i: int, amount: int) -> str:
        return " ".join(words[(i * 7 + j * (3 + i % 5)) % len(words)] for j in range(amount))

    return saved_rows(
        [
            {
                "instruction": f"Note {i}: say in your own words what this is about: {some(i, 14 + i % 9)}.",
                "input": "",
                "output": f"Note {i} is about {some(i + 3, 20 + i % 17)}.",
            }
            for i in range(count)
        ]
    )
