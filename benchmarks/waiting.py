"""What it costs how OpenMP's threads wait for each other: on a quiet machine, and beside a busy program on every core.

    python -m benchmarks.waiting [--rounds 5] [--only step,answers,large]

Each way of waiting is measured in fresh processes, in turns. Writes benchmarks/results/waiting/*.json and
waiting.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.fresh import SHAPE
from benchmarks.machine import machine
from benchmarks.store import HERE, Book, Part, Row
from phinetune.cpu_share import SPINS, WAITING

OWN = "libgomp's own"
WAYS: dict[str, dict[str, str]] = {
    OWN: {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    f"GOMP_SPINCOUNT={SPINS}, phinetune's": {"GOMP_SPINCOUNT": str(SPINS)},
}
STEP = {"engine": "fast", "dtype": "auto", "rounds": 5}
CASES: dict[str, tuple[str, str, Row]] = {
    "step": ("a step of 8 x 54 tokens, starter", "step", {"model": "starter", "chats": 8, "length": 54, **STEP}),
    "answers": ("8 answers of 32 tokens, starter", "generate", {"model": "starter", "limit": 32, "dtype": "auto"}),
    "large": ("a step of 4 x 256 tokens, 4 layers of Phi-3 mini", "step", {"model": SHAPE, "chats": 4, "length": 256}),
}
CASES["large"][2].update(STEP, rounds=2)
BUSY = [sys.executable, "-c", "while True: pass"]


def seconds(kind: str, options: Row, way: dict[str, str]) -> float:
    """The time of one measurement in a fresh process whose threads wait this way."""
    environment = {key: value for key, value in os.environ.items() if key not in WAITING} | way
    command = [sys.executable, "-m", "benchmarks.worker", kind, json.dumps(options)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Programs that do nothing but use a core each."""
    programs = [subprocess.Popen(BUSY) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def compare(case: str, rounds: int, prompts: str) -> list[Row]:
    """The times of a case by way and by state of the machine, in seconds, a list of rounds each."""
    _, kind, options = CASES[case]
    given = {**options, "prompts": prompts, "way": "phinetune", "adapter": False} if kind == "generate" else options
    times: dict[str, dict[str, list[float]]] = {}
    for state, programs in (("quiet", 0), ("busy", os.cpu_count() or 1)):
        times[state] = {way: [] for way in WAYS}
        with busy_cores(programs):
            for _ in range(rounds if state == "quiet" else max(2, rounds // 2)):
                for way, environment in WAYS.items():
                    times[state][way].append(seconds(kind, given, environment))
    return compared(case, times)


def compared(case: str, times: dict[str, dict[str, list[float]]]) -> list[Row]:
    """A row a way: the median of its time over that of libgomp's own way in the same round, in each state."""
    rows = []
    for way in WAYS:
        row: Row = {"what": CASES[case][0], "way": way, "times": {state: times[state][way] for state in times}}
        for state, by_way in times.items():
            row[state] = statistics.median(b / a for a, b in zip(by_way[OWN], by_way[way], strict=True))
        row["busy over quiet"] = statistics.median(times["busy"][way]) / statistics.median(times["quiet"][way])
        rows.append(row)
    return rows


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    return [row["what"], row["way"], *(f"{row[key]:.2f}" for key in ("quiet", "busy", "busy over quiet"))]


def meaning(name: str, part: Part) -> str:
    """What busy means."""
    return "Busy: one program on each core that does nothing but use it. Medians of ratios in the same round."


HEADINGS = ("", "how threads wait", "quiet: time over own", "busy: time over own", "busy over quiet")
BOOK = Book("waiting", "How threads wait for each other", HEADINGS, cells, meaning, words=HEADINGS[:2])


def demo_prompts(folder: str) -> str:
    """A file of eight of the demo's prompts, as lists of token ids."""
    from phinetune.checkpoints.tokenizer import open_tokenizer
    from phinetune.config.model import ModelSection

    tokenizer: Any = open_tokenizer(ModelSection())
    texts = (HERE.parent / "src" / "phinetune" / "demo_data" / "train.jsonl").read_text().splitlines()[:8]
    chats = [[m for m in json.loads(text)["messages"] if m["role"] == "user"][:1] for text in texts]
    ids = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]
    file = Path(folder) / "prompts.json"
    file.write_text(json.dumps(ids))
    return str(file)


def main() -> None:
    """Run the cases, print a table, write the results."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--only", default=",".join(CASES))
    options = cli.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = demo_prompts(folder)
        parts = {case: compare(case, options.rounds, prompts) for case in options.only.split(",")}
    console, about = Console(), machine("auto")
    for case, rows in parts.items():
        console.print(BOOK.table(case, rows))
    written = BOOK.keep({case: {"machine": about, "rows": rows} for case, rows in parts.items()})
    console.print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
