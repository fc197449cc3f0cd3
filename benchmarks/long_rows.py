"""One row of up to 131,072 tokens at Phi-3 mini's shape with four layers: forward and backward, time a token, memory.

    python -m benchmarks.long_rows [--parts window,whole] [--only 4096,16384,32768,131072] [--dtype bfloat16]

`window` is the shape of Phi-3 mini 4k, whose queries see 2,047 keys at most; in `whole` they see all before them, as in
Phi-3.5 mini. Each length is a step in a fresh process, with `engine.activation_memory: auto`, so longer rows recompute
more; the shortest get a step before that does not count. The longest row takes ten minutes with a window, and some half
an hour without. Without one, attention grows with a row's length, and the time a token is a + b · n for n tokens: "by
a + b · n" says what the two shortest rows foretell for the others. Writes benchmarks/results/long_rows/*.json and
long_rows.md.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from benchmarks.fresh import SHAPE, measure
from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row

LENGTHS = (4096, 16384, 32768, 131072)
SHAPES = {"window": SHAPE, "whole": "random:{layers: 4, sliding_window: null}"}
TITLES = {"window": "a window of 2,047 tokens", "whole": "no window"}
WARM = 16384  # tokens up to which a first step is not counted; in longer rows it is a small share
HEADINGS = ("", "seconds", "tokens/s", "µs a token", "by a + b · n", "peak GB")


def row_of(shape: str, length: int, dtype: str) -> Row:
    """A step of one row."""
    rounds = 1 if length <= WARM else 0
    options = {"model": shape, "engine": "fast", "chats": 1, "length": length, "dtype": dtype, "memory": "auto"}
    return {"what": f"{length:,} tokens", "length": length, **measure("step", rounds=rounds, **options)}


def foretold(rows: list[Row]) -> None:
    """Add what the two shortest rows foretell for each."""
    known = sorted((row for row in rows if "seconds" in row), key=lambda row: int(row["length"]))[:2]
    if len(known) < 2:
        return
    (n, first), (m, second) = ((row["length"], row["seconds"] / row["length"]) for row in known)
    b = (second - first) / (m - n)
    for row in rows:
        row["foretold"] = first + b * (row["length"] - n)


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    if "failed" in row:
        return [row["what"], row["failed"], "", "", "", ""]
    return [
        row["what"],
        f"{row['seconds']:.1f}",
        f"{row['tokens_per_s']:.0f}",
        f"{1e6 * row['seconds'] / row['length']:,.0f}",
        f"{1e6 * row['foretold']:,.0f}" if "foretold" in row else "",
        f"{row['peak_gb']:.1f}",
    ]


def meaning(name: str, part: Part) -> str:
    """What was measured."""
    return "Forward and backward of one row, Phi-3 mini's shape with four layers, LoRA on all linear layers."


BOOK = Book("long_rows", "Long rows", HEADINGS, cells, meaning)


def main() -> None:
    """Measure, print a table, write the results after each row."""
    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--parts", default=",".join(SHAPES))
    cli.add_argument("--only", default=",".join(map(str, LENGTHS)))
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    options = cli.parse_args()
    here = machine(options.dtype)
    for part in options.parts.split(","):
        known = BOOK.sides().get(here["instructions"], {}).get(TITLES[part], {"rows": []})
        rows = {int(row["length"]): row for row in known["rows"]}  # other lengths stay
        for length in map(int, options.only.split(",")):
            rows[length] = row_of(SHAPES[part], length, options.dtype)
            listed = [rows[one] for one in sorted(rows)]
            if part == "whole":
                foretold(listed)
            written = BOOK.keep({TITLES[part]: {"machine": here, "rows": listed}})
            Console().print(BOOK.table(TITLES[part], listed))
    Console().print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
