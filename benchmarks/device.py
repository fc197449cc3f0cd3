"""One CUDA GPU: the tests marked `device`, then TRL + PEFT, TRL + Liger and this engine on Phi-3 mini's whole shape.

After them DPO beside TRL's trainer, and answers beside transformers' `generate`, on the same shape.

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
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
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
PREFERRED = {
    "TRL, its default": "trl-default",
    "TRL, reference computed once, no checkpointing": "trl-best",
    OURS: "ours",
}
PAIRS, TINY_PAIRS = 64, 2
BYTES_A_WORD = 3.7  # of the pairs' sentences; the tokenizer of a random model takes bytes
AT_ONCE, TINY_AT_ONCE = (8, 64), (2,)
ANSWER, TINY_ANSWER = 64, 4  # tokens
HEADINGS = ("", "tokens/s", "ms a step", "peak GB", "first loss", "× the first", "besides")


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


def preferred(config: Phi3Config, device: str, count: int, deadline: Deadline) -> list[Row]:
    """DPO, batch 8, on the same pairs: prompts of about 300 tokens, answers of about 100."""
    common = {"model": str(saved(config, device)), "count": count, "batch": 8, "device": device}
    rows = []
    for name, way in PREFERRED.items():
        found = measure("dpo", deadline, way=way, tokens_a_word=BYTES_A_WORD, **common)
        if "losses" in found:
            losses = found.pop("losses")
            found |= {"first_loss": losses[0], "last_loss": losses[-1], "step_seconds": 8 * found["a_pair"]}
            found["times"] = rows[0]["step_seconds"] / found["step_seconds"] if rows and "a_pair" in rows[0] else None
        rows.append({"what": name, **found})
    return rows


def answered(config: Phi3Config, device: str, counts: Sequence[int], limit: int, deadline: Deadline) -> list[Row]:
    """Greedy answers to prompts of 20 to 100 tokens, all together, under a new LoRA; no token ends an answer."""
    common = {"model": str(saved(config, device)), "limit": limit, "dtype": "bfloat16", "device": device}
    rows: list[Row] = []
    for count in counts:
        prompts = [[(7 * i + 3 * j) % 250 + 3 for j in range(20 + 80 * i // max(counts))] for i in range(count)]
        file = Path(tempfile.mkdtemp()) / "prompts.json"
        file.write_text(json.dumps(prompts))
        made: list[Row] = []
        for way in ("transformers", OURS):
            found = measure("generate", deadline, way=way, prompts=str(file), endless=True, **common)
            if "answers" in found:
                found["step_seconds"] = found["seconds"] / limit
                found["last"] = found.pop("answers")
            if made and "last" in made[0] and "last" in found:
                found["times"] = made[0]["seconds"] / found["seconds"]
                found["same"] = sum(a == b for a, b in zip(made[0]["last"], found["last"], strict=True)) / count
            made.append({"what": f"{count} together, {way}", **found})
        rows += [{key: value for key, value in row.items() if key != "last"} for row in made]
    return rows


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    if "failed" in row or "passed" in row:
        return [row["what"], "", "", "", "", "", row.get("failed") or row["said"]]
    besides = f"{row['same']:.0%} of the answers the same" if "same" in row else ""
    return [
        row["what"],
        f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "",
        f"{1e3 * row['step_seconds']:,.0f}",
        f"{row.get('device_gb', row['peak_gb']):.1f}",
        f"{row['first_loss']:.4f}" if "first_loss" in row else "",
        f"{row['times']:.2f}" if row.get("times") else "",
        f"last loss {row['last_loss']:.4f}" if "last_loss" in row else besides,
    ]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    if name == "tests":
        return tests.__doc__ or ""
    if name == "dpo":
        return f"{part['shape']} in bfloat16. {preferred.__doc__}"
    if name == "answers":
        return f"{part['shape']} in bfloat16. {answered.__doc__}"
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
    keep("dpo", preferred(config, device, TINY_PAIRS if tiny else PAIRS, deadline))
    counts, limit = (TINY_AT_ONCE, TINY_ANSWER) if tiny else (AT_ONCE, ANSWER)
    keep("answers", answered(config, device, counts, limit, deadline))
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
