"""Training speed and memory beside TRL with PEFT, in fresh processes on the same machine, model and rows.

    python -m benchmarks.train [--only starter,shape,peak,prefix,whole] [--dtype bfloat16] [--quick]

Writes benchmarks/results/train.json and train.md. Tokens are real ones: padding does not count. "share of peak" is
useful work (see `benchmarks.worker.useful`; recomputation does not count) over the best rate of a matrix product,
in the same dtype or in float32, whichever is faster here; measured beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHARED = HERE.parents[1] / "shared"
SHAPE = "random:{layers: 4}"  # Phi-3 mini's, four layers of it

PATIENCE = 1800  # seconds a measurement
COMPILING = 480  # where torch.compile is tried: it may compile for longer than the run is long

Row = dict[str, Any]


def measure(kind: str, **options: Any) -> Row:
    """One measurement in a fresh process; a peer that fails or takes too long gives a line in place of numbers."""
    command = [sys.executable, "-m", "benchmarks.worker", kind, json.dumps(options)]
    patience = COMPILING if options.get("compile") or options.get("engine") == "compiled" else PATIENCE
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {patience // 60} minutes"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    if "tokens" in row:
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
    return row


def alpaca_rows() -> str:
    """The benchmark's rows: those beside the repository, else the demo's in the same form."""
    there = SHARED / "data" / "alpaca_en_demo.json"
    if there.is_file():
        return str(there)
    demo = HERE.parent / "src" / "phinetune" / "demo_data" / "train.jsonl"
    rows = [json.loads(line)["messages"] for line in demo.read_text().splitlines()]
    made = [{"instruction": m[-2]["content"], "input": "", "output": m[-1]["content"]} for m in rows if len(m) >= 2]
    file = Path(tempfile.mkdtemp()) / "rows.json"
    file.write_text(json.dumps(made))
    return str(file)


def saved_shape(dtype: str) -> str:
    """Phi-3 mini's shape with four layers as a folder that TRL can load, with the real tokenizer where it is."""
    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection

    tokenizer = SHARED / "phi3-tokenizer"
    section = ModelSection(path=SHAPE, dtype=dtype, tokenizer=str(tokenizer) if tokenizer.is_dir() else None)
    loaded = load_base(section, fast=False)
    folder = tempfile.mkdtemp()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


# Settings of TRL that people tune for speed; the first is its default.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "TRL, its default (batch 8, checkpointing)": {"batch": 8, "checkpointing": True},
    "TRL, batch 1": {"batch": 1},
    "TRL, packing": {"batch": 1, "packing": True},
    "TRL, batch 8": {"batch": 8},
    "TRL, batch 1, torch_compile": {"batch": 1, "compile": True},
}

QUICK = 3  # settings; torch_compile takes minutes to begin


def against_trl(model: str, rows: int, dtype: str, settings: Mapping[str, dict[str, Any]] = TRL_SETTINGS) -> list[Row]:
    """TRL in these settings, and this project at batch 8, on the same rows."""
    common = {"model": model, "data": alpaca_rows(), "rows": rows, "dtype": dtype}
    found = [{"what": name, **measure("trl", **common, **setting)} for name, setting in settings.items()]
    ours = {"what": "phinetune, batch 8", **measure("phinetune", **common, batch=8, engine={})}
    default = found[0].get("tokens_per_s")
    best = max(row.get("tokens_per_s", 0.0) for row in found)
    for row in (*found, ours):
        row["times_default"] = row.get("tokens_per_s", 0.0) / default if default else None
    ours["times_best"] = ours.get("tokens_per_s", 0.0) / best if best else None
    return [*found, ours]


def starter(dtype: str, quick: bool) -> list[Row]:
    """The starter model, 64 rows."""
    from phinetune.checkpoints.starter import ensure_starter

    chosen = dict(list(TRL_SETTINGS.items())[:QUICK]) if quick else TRL_SETTINGS
    return against_trl(str(ensure_starter()), 16 if quick else 64, dtype, chosen)


def shape(dtype: str, quick: bool) -> list[Row]:
    """Phi-3 mini's shape with 4 layers: 16 rows against TRL, and 4 × 256 tokens, all labelled, without any padding."""
    rows = [] if quick else against_trl(saved_shape(dtype), 16, dtype)
    even = {"model": SHAPE, "chats": 4, "length": 256, "dtype": dtype}
    steps = [
        {"what": f"4 × 256 tokens, {name}", **measure("step", engine=engine, **even)}
        for engine, name in (
            ("plain", "transformers + PEFT"),
            ("compiled", "transformers + PEFT, compiled"),
            ("fast", "phinetune"),
        )
    ]
    for row in steps[:-1]:
        if "seconds" in row:
            steps[-1][f"times {row['what'].split(', ', 1)[1]}"] = row["seconds"] / steps[-1]["seconds"]
    return [*rows, *steps]


def peak(dtype: str, quick: bool) -> list[Row]:
    """Share of the machine's peak at Phi-3 mini's shape with 4 layers, and growth with the tokens of a step."""
    rates = measure("gemm", dtype=dtype)["flop_per_s"]
    rows = []
    for chats, length in ((4, 256), (4, 1024), (1, 4096)) + (() if quick else ((4, 4096), (1, 16384))):
        rounds = 3 if chats * length <= 4096 else 1
        common = {"model": SHAPE, "engine": "fast", "chats": chats, "length": length, "dtype": dtype, "memory": "auto"}
        row = measure("step", **common, rounds=rounds, attention_apart=True)
        if "seconds" in row:
            rest = row["seconds"] * (1 - row["attention_share"])
            row["ms_a_token_without_attention"] = 1e3 * rest / row["tokens"]
            row["share_of_peak"] = row["useful_flop"] / row["seconds"] / max(rates.values())
            row[f"times the rate of {dtype} products"] = row["useful_flop"] / row["seconds"] / rates[dtype]
        rows.append({"what": f"{chats} × {length} tokens", **row})
    seen = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    return [{"what": f"matrix products, GFLOP/s: {seen}"}, *rows]


def prefix(dtype: str, quick: bool) -> list[Row]:
    """A 600-token shared system prompt over 100-token replies, 16 a step, on the starter's shape."""
    from phinetune.checkpoints.starter import ensure_starter

    common = {
        "model": str(ensure_starter()),
        "engine": "fast",
        "chats": 8 if quick else 16,
        "length": 700,
        "shared": 600,
        "labelled": 100,
        "dtype": dtype,
    }
    rows = [
        {"what": f"600 shared tokens, {name}", **measure("step", **common, sharing=sharing)}
        for name, sharing in (("each row alone", False), ("computed once", True))
    ]
    rows[1]["times each row alone"] = rows[0]["seconds"] / rows[1]["seconds"]
    return rows


def whole(dtype: str, quick: bool) -> list[Row]:
    """The whole of Phi-3 mini, 32 layers, in bfloat16, 1,024 tokens a step, activation memory auto; its first step."""
    row = measure(
        "step", model="random:phi-3-mini", engine="fast", chats=4, length=256, dtype="bfloat16", memory="auto", rounds=0
    )
    return [{"what": "Phi-3 mini, 4 × 256 tokens, auto", **row}]


PARTS: dict[str, Callable[[str, bool], list[Row]]] = {
    "starter": starter,
    "shape": shape,
    "peak": peak,
    "prefix": prefix,
    "whole": whole,
}


def machine(dtype: str) -> dict[str, Any]:
    """What was measured on."""
    import peft
    import transformers
    import trl

    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 2,
        "memory_gb": round(int(memory) / 1e6, 1),
        "dtype": dtype,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, trl)},
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


def as_table(title: str, rows: list[Row]) -> Table:
    """The rows of a part, numbers rounded for reading."""
    table = Table(title=title)
    for column in ("", "tokens/s", "peak GB", "first loss", "× TRL's default", "besides"):
        table.add_column(column, justify="left" if column in ("", "besides") else "right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    """A row as text: name, tokens/s, peak memory, first loss, ratio to the default, whatever else was found."""
    besides = [
        f"{k.replace('_', ' ')} {v:.2f}" for k, v in row.items() if k.startswith("times") and k != "times_default"
    ]
    shares = ("share_of_peak", "attention_share", "overhead")
    besides += [f"{k.replace('_', ' ')} {v:.1%}" for k, v in row.items() if k in shares]
    besides += [f"{k.replace('_', ' ')} {v:.2f}" for k, v in row.items() if k.startswith("ms_")]
    besides += [f"{k.removesuffix('_gb')} {v:.1f} GB" for k, v in row.items() if k in ("load_gb", "training_gb")]
    besides += [f"{row['seconds']:.1f} s"] if "tokens" not in row and "seconds" in row else []
    besides += [row["failed"]] if "failed" in row else []
    return [
        row["what"],
        f"{row['tokens_per_s']:.1f}" if "tokens_per_s" in row else "",
        f"{row['peak_gb']:.1f}" if "peak_gb" in row else "",
        f"{row['first_loss']:.4f}" if "first_loss" in row else "",
        f"{row['times_default']:.2f}" if row.get("times_default") else "",
        ", ".join(besides),
    ]


def write(
    found: dict[str, list[Row]],
    about: dict[str, Any],
    meanings: Mapping[str, str | None],
    name: str = "train",
    title: str = "Training beside TRL with PEFT",
) -> None:
    """results/NAME.json, and NAME.md for people; parts that were not run now are kept from before.

    Args:
        meanings: what each part is.
    """
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    parts = {**before.get("parts", {}), **{part: {"machine": about, "rows": rows} for part, rows in found.items()}}
    file.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    lines = [f"# {title}", "", f"Written by `python -m benchmarks.{name}`, which says how."]
    for key, part in parts.items():
        m = part["machine"]
        lines += ["", f"## {key}", "", (meanings[key] or "").strip()]
        lines += [
            f"Measured {m['date']} on {m['processor']} ({m['instructions']}), {m['threads']} threads, {m['dtype']}.",
            "",
        ]
        lines += ["| | tokens/s | peak GB | first loss | × TRL's default | besides |", "|---|---:|---:|---:|---:|---|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in part["rows"]]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the parts, print a table after each, write the results."""
    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--only", default=",".join(PARTS))
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    cli.add_argument("--quick", action="store_true", help="fewer rows and shapes")
    options = cli.parse_args()
    console = Console()
    for name in options.only.split(","):
        rows = PARTS[name](options.dtype, options.quick)
        console.print(as_table(name, rows))
        about = machine("bfloat16" if name == "whole" else options.dtype)
        write({name: rows}, about, {part: measured.__doc__ for part, measured in PARTS.items()})
    console.print(f"Wrote {RESULTS / 'train.md'} and train.json")


if __name__ == "__main__":
    main()
