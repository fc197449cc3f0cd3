"""Forward and backward of `phinetune.lora`'s layers beside the bare products, loralib's and PEFT's layers.

    python -m benchmarks.lora_layers [--dtype float32] [--rounds 15] [--small]

The four are timed in turns, round after round, and the ratios are medians over the rounds: the machine's noise hits
all alike. "share of bare" is the time of the two bare products `x Wᵀ` and `dy W` over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import loralib
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.config import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from phinetune import lora
from phinetune.checkpoints.device import has_native_bf16

RANK = 16
# (rows, in, out): qkv, output, gate and up, down of Phi-3 mini
PHI3 = [(2048, 3072, 9216), (2048, 3072, 3072), (2048, 3072, 16384), (2048, 8192, 3072)]
SMALL = [(256, width, width) for width in (64, 128, 256, 576)]
MERGED = [(2048, 3072, 9216), (256, 576, 576 * 3)]

Step = Callable[[], None]


def step_of(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Step:
    """One forward and backward of a layer in training."""
    layer.train()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        for tensor in trained:
            tensor.grad = None
        layer(x).backward(dy)

    return step


def bare_step(weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> Step:
    """The two products without which there is no forward and backward of a frozen linear layer."""
    detached = x.detach()

    def step() -> None:
        with torch.no_grad():
            torch.nn.functional.linear(detached, weight)
            torch.mm(dy, weight)

    return step


def peft_layer(base: nn.Linear) -> nn.Module:
    """PEFT's layer as PEFT sets it up: adapters in float32, whatever the base's dtype."""
    config = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0)
    layer: Any = PeftLinear(base, "default", config, r=RANK, lora_alpha=32)
    layer.base_layer.requires_grad_(False)
    for part in (layer.lora_A, layer.lora_B):
        part.to(torch.float32)
    return layer


def linear_rivals(rows: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> dict[str, Step]:
    """Steps by name over one base weight."""
    base = nn.Linear(fan_in, fan_out, bias=False, dtype=dtype)
    x = torch.randn(rows, fan_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, fan_out, dtype=dtype)
    ours = lora.Linear.from_base(base, RANK, lora_alpha=32)
    for name in ("lora_A", "lora_B"):  # float32 adapters, as phinetune trains them
        setattr(ours, name, nn.Parameter(getattr(ours, name).detach().float()))
    theirs = loralib.Linear(fan_in, fan_out, r=RANK, lora_alpha=32, bias=False, dtype=dtype)
    theirs.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
    return {
        "bare": bare_step(base.weight.detach(), x, dy),
        "ours": step_of(ours, x, dy),
        "loralib": step_of(theirs, x, dy),
        "PEFT": step_of(peft_layer(base), x, dy),
    }


def merged_rivals(rows: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> dict[str, Step]:
    """`MergedLinear` with three adapted splits."""
    x = torch.randn(rows, fan_in, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, fan_out, dtype=dtype)
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 32, "enable_lora": [True] * 3, "bias": False, "dtype": dtype}
    ours, theirs = (kind(fan_in, fan_out, **options) for kind in (lora.MergedLinear, loralib.MergedLinear))
    return {
        "bare": bare_step(ours.weight.detach(), x, dy),
        "ours": step_of(ours, x, dy),
        "loralib": step_of(theirs, x, dy),
    }


def medians(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds a step, round by round; small steps are repeated within a round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for step in steps.values():
        step()
    repeats = max(1, round(0.05 * len(steps) / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


def ratio(times: dict[str, list[float]], name: str) -> str:
    """Median over the rounds of a rival's time over ours."""
    if name not in times:
        return "—"
    return f"{statistics.median(theirs / ours for theirs, ours in zip(times[name], times['ours'], strict=True)):.2f}"


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    native = has_native_bf16(torch.device("cpu"))
    cli.add_argument("--dtype", default="bfloat16" if native else "float32")
    cli.add_argument("--rounds", type=int, default=15)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--small", action="store_true", help="the small layers only")
    given = cli.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    table = Table(title=f"{given.dtype}, rank {RANK}, {given.threads} threads, medians of {given.rounds} paired rounds")
    for column in ("layer", "rows × in → out", "ms", "share of bare", "loralib / ours", "PEFT / ours"):
        table.add_column(column, justify="right")
    shapes = [("Linear", shape) for shape in SMALL + ([] if given.small else PHI3)]
    shapes += [("MergedLinear", shape) for shape in (MERGED[1:] if given.small else MERGED)]
    for kind, (rows, fan_in, fan_out) in shapes:
        rivals = (linear_rivals if kind == "Linear" else merged_rivals)(rows, fan_in, fan_out, dtype)
        times = medians(rivals, given.rounds)
        mine = f"{1e3 * statistics.median(times['ours']):.3f}"
        shape = f"{rows} × {fan_in} → {fan_out}"
        table.add_row(kind, shape, mine, ratio(times, "bare"), ratio(times, "loralib"), ratio(times, "PEFT"))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
