"""The main ratios in five minutes: training beside TRL and transformers, share of the peak, answers, the first step.

    python -m benchmarks.quick [--seconds 300] [--dtype bfloat16]

Writes benchmarks/results/quick/*.json and quick.md. Fewer rows and rounds than `benchmarks.train` has, in fresh
processes, one after the other; what does not fit into the time is named as left out. Trust the ratios, not the digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console

from benchmarks.fresh import Deadline, short_chats
from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row
from benchmarks.train import HEADINGS, PEERS, TRL_SETTINGS, against_trl, at_shape, cells

SECONDS = 300
ROWS = 16  # of Alpaca's
CHATS = 48  # short ones
TRIED = ("TRL, its default (batch 8, checkpointing)", "TRL, batch 1")  # TRL's default, and its best so far


def starter(dtype: str, deadline: Deadline) -> list[Row]:
    """The starter on 16 Alpaca rows, beside TRL at its default and at batch 1."""
    from phinetune.checkpoints.starter import ensure_starter

    settings = {name: TRL_SETTINGS[name] for name in TRIED}
    return against_trl(str(ensure_starter()), ROWS, dtype, settings, deadline=deadline)


def chats(dtype: str, deadline: Deadline) -> list[Row]:
    """The starter on 48 short chats of about 96 tokens, batch 16, beside TRL at the same settings."""
    from phinetune.checkpoints.starter import ensure_starter

    settings = {"TRL, batch 16": {"batch": 16}}
    return against_trl(
        str(ensure_starter()), CHATS, dtype, settings, data=short_chats(CHATS), batch=16, deadline=deadline
    )


def steps(dtype: str, deadline: Deadline) -> list[Row]:
    """Phi-3 mini's shape with 4 layers, all tokens labelled: share of the peak, and transformers + PEFT at 4 × 256."""
    rows: list[Row] = []
    plain = {"plain": PEERS["plain"]}
    for count, length, peers in ((4, 256, plain), (4, 1024, {}), (1, 4096, {})):
        rows += at_shape(count, length, dtype, peers, deadline, rounds=2)
    return rows


def compiled(dtype: str, deadline: Deadline) -> list[Row]:
    """The same 4 × 256 tokens beside torch.compile of transformers + PEFT, which compiles for a minute or two."""
    return at_shape(4, 256, dtype, {"compiled": PEERS["compiled"]}, deadline, rounds=2)


PARTS: dict[str, Callable[[str, Deadline], list[Row]]] = {
    "starter": starter,
    "steps": steps,
    "chats": chats,
    "compiled": compiled,
}


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return PARTS[name].__doc__ or ""


BOOK = Book("quick", "The main ratios in five minutes", HEADINGS, cells, meaning)


def main() -> None:
    """Run the parts within the time, print a table after each, write the results."""
    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--seconds", type=float, default=SECONDS)
    cli.add_argument("--only", default=",".join(PARTS))
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    options = cli.parse_args()
    console, deadline = Console(), Deadline(options.seconds)
    for name in options.only.split(","):
        rows = PARTS[name](options.dtype, deadline)
        console.print(BOOK.table(name, rows))
        written = BOOK.keep({name: {"machine": machine(options.dtype), "rows": rows}})
    console.print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
