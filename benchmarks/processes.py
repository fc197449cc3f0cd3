"""Two processes of one core each beside one process of one core, on the starter: `phinetune train --nproc 2`.

    python -m benchmarks.processes [--model starter] [--steps 12] [--repeats 3]

Writes benchmarks/results/processes/*.json and processes.md. Both train the same steps of eight rows; the first two
steps do not count. The machine should do nothing else: two processes need two free cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.fresh import alpaca_rows
from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row

ROWS = 8  # of a step, over all processes
WARM = 2  # steps that do not count
BAR = 1.7

BOOK = Book(
    "processes",
    "Two processes beside one",
    ("", "tokens/s", "times"),
    lambda row: [row["name"], f"{row['tokens_per_s']:.0f}", f"{row['times']:.2f}"],
    lambda name, part: (
        f"{part['model']}, {part['steps']} steps of {ROWS} rows, each process on one core; the median of "
        f"{part['repeats']} pairs of runs. The bar is {BAR} times."
    ),
    words=("",),
)


def configured(model: str, steps: int, processes: int, folder: Path, **more: object) -> Path:
    """A run's YAML file."""
    training = {"output_dir": str(folder / "run"), "max_steps": steps, "logging_steps": 1, "save_strategy": "no"}
    training |= {"per_device_train_batch_size": ROWS // processes, "gradient_accumulation_steps": 1, "max_length": 512}
    tree = {
        "model": {"path": model, "device": "cpu"},
        "data": {"train": alpaca_rows(), "limit": 400},
        "peft_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training_config": {**training, "learning_rate": 2e-4, "eval_strategy": "no", **more},
        "evaluation": {"enabled": False},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def speed(run: Path) -> float:
    """Tokens a second of a run, without its first steps, from its metrics.jsonl."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    sizes = [after["tokens"] - before["tokens"] for before, after in itertools.pairwise(steps)]
    counted = list(zip(sizes, steps[1:], strict=True))[WARM - 1 :]
    return sum(size for size, _ in counted) / sum(size / entry["tokens_per_s"] for size, entry in counted)


def train(model: str, steps: int, processes: int) -> float:
    """Tokens a second of a run of so many processes, one core each."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = configured(model, steps, processes, folder)
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:processes])
        command = ["taskset", "-c", cores, sys.executable, "-m", "phinetune", "train", str(file)]
        several = ["--nproc", str(processes)] if processes > 1 else []
        subprocess.run(
            [*command, *several], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
        )
        return speed(folder / "run")


def measured(model: str, steps: int, repeats: int) -> Part:
    """Both, in turn, so that a machine that slows down slows both."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for processes, speeds in found.items():
            speeds.append(train(model, steps, processes))
            print(f"{processes}: {speeds[-1]:.0f} tokens/s", file=sys.stderr)
    rows: list[Row] = [
        {
            "name": f"{n} process{'es' * (n > 1)}",
            "tokens_per_s": statistics.median(speeds),
            "times": statistics.median(speed / one for speed, one in zip(speeds, found[1], strict=True)),
            "all": speeds,
        }
        for n, speeds in found.items()
    ]
    return {"machine": machine("auto"), "model": model, "steps": steps, "repeats": repeats, "rows": rows}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    part = measured(given.model, given.steps, given.repeats)
    for row in part["rows"]:
        Console().print(f"{row['name']}: {row['tokens_per_s']:.0f} tokens/s, {row['times']:.2f} times")
    BOOK.keep({"two": part})


if __name__ == "__main__":
    main()
