"""The time to the first step: importing, reading rows, loading, planning, and the step itself, of `phinetune train`.

    python -m benchmarks.startup [--rounds 5] [--rows 64]

Each round is the command in a fresh process, which ends after its first optimizer step; `benchmarks.startup_worker`
says how it knows where the time goes. Medians over the rounds, of seconds by the clock and of processor time: beside
other programs only the second means much. Writes benchmarks/results/startup/*.json and startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.fresh import alpaca_rows
from benchmarks.machine import machine
from benchmarks.store import HERE, Book, Part, Row

BATCH = 8
STEP = "forward and backward"
MOST_LIBRARIES = 12  # that a table names; the rest is one line
HEADINGS = ("", "seconds", "processor seconds", "share of the processor's")


def written_config(folder: Path, rows: int) -> Path:
    """A run's YAML file: the starter on Alpaca rows."""
    tree = {
        "model": {"path": "starter"},
        "data": {"train": alpaca_rows(), "limit": rows},
        "peft_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training_config": {
            "output_dir": str(folder / "run"),
            "per_device_train_batch_size": BATCH,
            "max_length": 1024,
        },
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def once(config: Path) -> Row:
    """One start, up to the end of its first step."""
    read, write = os.pipe()
    environment = {**os.environ, "REPORT_TO": str(write), "BEGAN": str(time.time())}
    command = [sys.executable, "-m", "benchmarks.startup_worker", "train", str(config), "--overwrite"]
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, pass_fds=[write], capture_output=True, text=True, check=False
    )
    os.close(write)
    with os.fdopen(read) as report:
        said = report.read()
    if not said:
        raise SystemExit(f"the command ended before its first step:\n{done.stderr}")
    found: Row = json.loads(said)
    return found


def summed_up(rounds: Sequence[Row]) -> list[Row]:
    """A row a phase, the largest first, then the libraries that the imports are made of."""

    def median(table: str, key: str, place: int) -> float:
        return statistics.median(one[table].get(key, (0.0, 0.0))[place] for one in rounds)

    def rows_of(table: str) -> list[Row]:
        keys = dict.fromkeys(key for one in rounds for key in one[table])
        rows = [{"what": key, "seconds": median(table, key, 0), "processor": median(table, key, 1)} for key in keys]
        return sorted(rows, key=lambda row: -row["processor"])

    whole = {
        "what": "to the end of the first step",
        "seconds": statistics.median(one["seconds"] for one in rounds),
        "processor": statistics.median(one["processor_seconds"] for one in rounds),
    }
    phases, libraries = rows_of("phases"), rows_of("libraries")
    step = next((row for row in phases if row["what"] == STEP), {"seconds": 0.0, "processor": 0.0})
    begun = {key: whole[key] - step[key] for key in ("seconds", "processor")}
    rows = [whole, {"what": "to the begin of the first step", **begun}, *phases]
    rows += [{**row, "what": f"imports: {row['what']}"} for row in libraries[:MOST_LIBRARIES]]
    for row in rows:
        row["share"] = row["processor"] / whole["processor"]
    return rows


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    return [row["what"], f"{row['seconds']:.2f}", f"{row['processor']:.2f}", f"{row['share']:.0%}"]


def meaning(name: str, part: Part) -> str:
    """What was started."""
    return (
        f"`phinetune train` with the starter on {part['alpaca']} Alpaca rows, batch {BATCH}, {part['rounds']} rounds. "
        "Times of a library are its own, without what it imports."
    )


BOOK = Book("startup", "Time to the first step", HEADINGS, cells, meaning)


def main() -> None:
    """Run the rounds, print a table, write the results."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--rows", type=int, default=64)
    options = cli.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = written_config(Path(folder), options.rows)
        rows = summed_up([once(config) for _ in range(options.rounds)])
    console = Console()
    console.print(BOOK.table("time to the first step", rows))
    part = {"machine": machine("auto"), "alpaca": options.rows, "rounds": options.rounds, "rows": rows}
    console.print(f"Wrote {' and '.join(map(str, BOOK.keep({'train': part})))}")


if __name__ == "__main__":
    main()
