"""One CUDA GPU: the tests marked `device`, then TRL + PEFT, TRL + Liger and this engine on Phi-3 mini's whole shape.

    pip install 'phinetune[quant]' pytest liger-kernel      # Liger only if it is to be measured
    python -m benchmarks.device [--seconds 480] [--tiny] [--skip-tests]

Needs this repository, one GPU with 24 GB or more (a way that needs more says so), and 8 GB of disk in phinetune's cache
folder; no compiler, no hub. Which operators serve on CUDA is the engine's choice; this script makes none.
The weights are random, of the true shape, in bfloat16 and in NF4. Each trainer is a fresh process and trains on the
same rows of one length, so nobody pads; a step's time is the median of the steps after the first two. Writes
benchmarks/results/device/*.json and device.md; what does not fit into the time is named as left out.

`--tiny` is a model of two layers and few steps, on the CPU where there is no GPU: it shows that the script works, and
says nothing about speed. It writes to a folder that is named at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Phi3Config

from benchmarks.fresh import Deadline, measure
from benchmarks.machine import machine
from benchmarks.qlora import made_rows, saved
from benchmarks.store import HERE, Book, Part, Row
from phinetune.checkpoints.random_shapes import parse_shape

SECONDS = 480
TESTING = 150  # seconds of them that the tests may take
LEAST_GB = 20  # what a 3.8-billion-parameter model in 16 bits takes while it trains at this length
WHOLE, STEPS, CHATS, LENGTH = "random:phi-3-mini", 10, 8, 512
TINY = "random:{layers: 2, hidden_size: 64, intermediate_size: 128, heads: 4, kv_heads: 2, vocab: 320}"
TINY_STEPS, TINY_CHATS, TINY_LENGTH = 4, 2, 48

# By name: the worker's kind and its options. Those that matter most come first.
WAYS: dict[str, tuple[str, Row]] = {
    "TRL + PEFT": ("trl", {}),
    "TRL + Liger": ("trl", {"liger": True}),
    "phinetune": ("phinetune", {"engine": {}}),
    "TRL + PEFT, its default (checkpointing)": ("trl", {"checkpointing": True}),
}
OURS = "phinetune"
HEADINGS = ("", "tokens/s", "ms a step", "peak GB", "first loss", "× TRL + PEFT", "besides")


def tests(deadline: Deadline) -> list[Row]:
    """The tests marked `device`, on the device: parity of loss, gradients and answers with transformers and PEFT."""
    command = [sys.executable, "-m", "pytest", "-m", "device", "tests/device", "-p", "no:cacheprovider"]
    what = "pytest -m device"
    try:
        patience = max(1.0, min(TESTING, deadline.left))
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return [{"what": what, "failed": f"not done in {patience:.0f} seconds"}]
    said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no message"]
    if done.returncode:
        named = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        return [{"what": what, "failed": "; ".join([said[-1], *named])}]
    return [{"what": what, "passed": int(re.findall(r"(\d+) passed", said[-1])[0]), "said": said[-1]}]


def trained(
    config: Phi3Config, device: str, quantization: str, sizes: tuple[int, int, int], deadline: Deadline
) -> list[Row]:
    """Every way on the same weights and rows."""
    steps, chats, length = sizes
    common = {
        "model": str(saved(config, device)),
        **made_rows(config, steps, chats, length),
        "dtype": "bfloat16",
        "quantization": quantization,
        "batch": chats,
        "device": device,
    }
    rows = []
    for name, (kind, options) in WAYS.items():
        absent = "liger-kernel is not installed" if options.get("liger") and not find_spec("liger_kernel") else None
        found = {"failed": absent} if absent else measure(kind, deadline, **common, **options)
        if "step_seconds" in found:
            found["tokens_per_s"] = found["tokens"] / steps / found["step_seconds"]
            found["times"] = (
                rows[0]["step_seconds"] / found["step_seconds"] if rows and "step_seconds" in rows[0] else None
            )
        rows.append({"what": name, **found})
    return rows


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    if "failed" in row or "passed" in row:
        return [row["what"], "", "", "", "", "", row.get("failed") or row["said"]]
    return [
        row["what"],
        f"{row['tokens_per_s']:,.0f}",
        f"{1e3 * row['step_seconds']:,.0f}",
        f"{row.get('device_gb', row['peak_gb']):.1f}",
        f"{row['first_loss']:.4f}",
        f"{row['times']:.2f}" if row.get("times") else "",
        f"last loss {row['last_loss']:.4f}",
    ]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    if name == "tests":
        return tests.__doc__ or ""
    steps, chats, length = part["sizes"]
    kind = "in NF4" if name == "nf4" else "in bfloat16"
    memory = "the most that torch held on the device" if "cuda" in part["machine"] else "resident memory at its largest"
    return (
        f"{part['shape']} {kind}, {steps} steps of {chats} × {length} tokens, rank 16 on all layers. Memory: {memory}."
    )


BOOK = Book("device", "On one CUDA device", HEADINGS, cells, meaning)


def run(tiny: bool, deadline: Deadline, book: Book, say: Callable[[Any], None], *, testing: bool = True) -> list[Path]:
    """All parts, a table after each, kept as they come.

    Returns:
        the files written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, sizes = (TINY, (TINY_STEPS, TINY_CHATS, TINY_LENGTH)) if tiny else (WHOLE, (STEPS, CHATS, LENGTH))
    config, about = parse_shape(shape), machine("bfloat16", torch.device(device))
    written: list[Path] = []

    def keep(name: str, rows: list[Row]) -> None:
        say(book.table(name, rows))
        written[:] = book.keep({name: {"machine": about, "shape": shape, "sizes": list(sizes), "rows": rows}})

    if testing:
        keep("tests", tests(deadline))
    for name, quantization in (("bfloat16", "none"), ("nf4", "nf4")):
        if quantization == "nf4" and not find_spec("bitsandbytes"):
            keep(name, [{"what": "NF4", "failed": "bitsandbytes is not installed (phinetune[quant])"}])
        else:
            keep(name, trained(config, device, quantization, sizes, deadline))
    return written


def why_not() -> str | None:
    """Why the whole shape can't be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device that torch sees; `--tiny` tries the script on the CPU"
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    return f"the device has {total:.0f} GB, and this takes {LEAST_GB}; try `--tiny`" if total < LEAST_GB else None


def main() -> None:
    """Run the parts within the time, write the results."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--seconds", type=float, default=SECONDS)
    cli.add_argument("--tiny", action="store_true", help="two layers, few steps; a CPU will do")
    cli.add_argument("--skip-tests", action="store_true")
    options = cli.parse_args()
    reason = None if options.tiny else why_not()
    if reason:
        raise SystemExit(reason)
    book = dataclasses.replace(BOOK, folder=Path(tempfile.mkdtemp())) if options.tiny else BOOK
    console = Console()
    written = run(options.tiny, Deadline(options.seconds), book, console.print, testing=not options.skip_tests)
    console.print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
