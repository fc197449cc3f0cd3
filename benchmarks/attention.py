"""Attention's forward and backward by segment length: blocks of matrix products beside torch's fused attention.

    python -m benchmarks.attention [--dtype float32] [--lengths 64,128,256,512,1024,2048,4096] [--rounds 5]

What `FUSED_FROM` in `phinetune.engine.kernels.attention` rests on. 4,096 tokens of Phi-3 mini's heads are cut into
segments of one length. The two ways take turns; the ratio is a median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from phinetune.engine.attention_plan import Heads, fused_run, grouped_run
from phinetune.engine.kernels.attention import attention
from phinetune.engine.segments import Segment

HEADS = Heads(heads=32, kv_heads=32, size=96, scaling=96**-0.5)
TOKENS = 4096


def step_of(length: int, dtype: torch.dtype, *, fused: bool) -> Callable[[], None]:
    """Forward and backward over segments of `length` tokens."""
    count = max(1, TOKENS // length)
    qkv = torch.randn(count * length, HEADS.total * HEADS.size, dtype=dtype, requires_grad=True)
    grad = torch.randn(len(qkv), HEADS.heads * HEADS.size, dtype=dtype)
    angles = torch.rand(len(qkv), HEADS.size // 2)
    segments = [Segment(i * length, (i + 1) * length) for i in range(count)]
    runs = [fused_run([s]) for s in segments] if fused else [grouped_run(segments, HEADS, qkv.device)]

    def step() -> None:
        # Attention writes into what it is given, which must not be a leaf.
        attention(qkv * 1, angles.cos(), angles.sin(), runs, HEADS).backward(grad)
        qkv.grad = None

    return step


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--dtype", default="float32")
    cli.add_argument("--lengths", default="64,128,256,512,1024,2048,4096")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--threads", type=int, default=2)
    given = cli.parse_args()
    torch.set_num_threads(given.threads)
    table = Table(title=f"{given.dtype}, {given.threads} threads, medians of {given.rounds} paired rounds")
    for column in ("tokens a segment", "blocks, ms", "fused, ms", "fused / blocks"):
        table.add_column(column, justify="right")
    for length in map(int, given.lengths.split(",")):
        ways = [step_of(length, getattr(torch, given.dtype), fused=fused) for fused in (False, True)]
        for way in ways:
            way()
        rounds = [[timed(way) for way in ways] for _ in range(given.rounds)]
        blocks, fused = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in rounds)
        table.add_row(f"{length:,}", f"{1e3 * blocks:.0f}", f"{1e3 * fused:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
