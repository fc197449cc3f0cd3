"""Attention's forward and backward by segment length: native kernels, torch's products and torch's fused attention.

    python -m benchmarks.attention [--dtype bfloat16] [--lengths 64,256,1024,4096] [--rounds 5] [--threads 2]

About 4,096 tokens of Phi-3 mini's heads are cut into segments of one length. The three forms take turns; ratios are
medians over the rounds. `FUSED_FROM` in `phinetune.engine.kernels.attention` rests on the last two. "Share of the rate"
is what a query must see, over the best rate of a matrix product in the same dtype. Writes
benchmarks/results/attention/*.json and attention.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.products import best_rate, operands
from benchmarks.store import Book, Part, Row
from phinetune.engine.attention_plan import AttentionRun, Heads, fused_run, grouped_run, trees_run
from phinetune.engine.kernels.attention import attention
from phinetune.engine.segments import Segment

HEADS = Heads(heads=32, kv_heads=32, size=96, scaling=96**-0.5)
TOKENS = 4096
FORMS = ("native", "products", "fused")


def runs_of(form: str, length: int) -> list[AttentionRun]:
    """How a form computes about `TOKENS` tokens in segments of `length`."""
    segments = [Segment(i * length, (i + 1) * length) for i in range(max(1, TOKENS // length))]
    if form == "fused":
        return [fused_run([segment]) for segment in segments]
    if form == "native":
        return [trees_run(torch.tensor([(segment.start, segment.stop, -1) for segment in segments]))]
    return [grouped_run(segments, HEADS, torch.device("cpu"))]


def step_of(form: str, length: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward over segments of `length` tokens."""
    runs = runs_of(form, length)
    tokens = sum(run.length for run in runs)
    qkv = torch.randn(tokens, HEADS.total * HEADS.size, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, HEADS.heads * HEADS.size, dtype=dtype)
    angles = torch.rand(tokens, HEADS.size // 2)

    def step() -> None:
        # Attention writes into what it is given, which must not be a leaf.
        attention(qkv * 1, angles.cos(), angles.sin(), runs, HEADS).backward(grad)
        qkv.grad = None

    return step


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measured(length: int, dtype: torch.dtype, rounds: int, rate: float) -> Row:
    """A row: medians of paired rounds."""
    steps = {form: step_of(form, length, dtype) for form in FORMS}
    for step in steps.values():
        step()
    found = [{form: timed(step) for form, step in steps.items()} for _ in range(rounds)]
    row: Row = {"length": length, **{form: statistics.median(one[form] for one in found) for form in FORMS}}
    for form in FORMS[1:]:
        row[f"{form}_over_native"] = statistics.median(one[form] / one["native"] for one in found)
    # Two products forward and five backward, of the scores that are not masked.
    work = 7 * 2 * max(1, TOKENS // length) * length * (length + 1) / 2 * HEADS.size * HEADS.heads
    return {**row, "share_of_rate": work / row["native"] / rate}


def cells(row: Row) -> list[str]:
    """A row as the table shows it."""
    ratios = [f"{row[f'{form}_over_native']:.2f}" for form in FORMS[1:]]
    return [f"{row['length']:,}", f"{1e3 * row['native']:.0f}", f"{100 * row['share_of_rate']:.0f}%", *ratios]


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return (
        f"Forward, backward and rotation of attention in {name}: about {TOKENS:,} tokens of Phi-3 mini's heads, in "
        f"segments of one length. The best matrix product ran at {part['rate'] / 1e9:.0f} GFLOP/s."
    )


HEADINGS = (
    "tokens a segment",
    "native, ms",
    "share of the rate",
    "torch's products ÷ native",
    "torch's fused ÷ native",
)
BOOK = Book("attention", "Attention: native kernels beside torch", HEADINGS, cells, meaning, words=())


def main() -> None:
    """Measure, print the table and write the results."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--dtype", default="bfloat16")
    cli.add_argument("--lengths", default="64,256,1024,4096")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--threads", type=int, default=2)
    given = cli.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    rate = best_rate(operands(getattr(torch, given.dtype)), 5)
    rows = [measured(length, dtype, given.rounds, rate) for length in map(int, given.lengths.split(","))]
    Console().print(BOOK.table(given.dtype, rows))
    written = BOOK.keep({given.dtype: {"machine": machine(given.dtype), "rows": rows, "rate": rate}})
    Console().print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
