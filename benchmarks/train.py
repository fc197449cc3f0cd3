"""Training speed and memory beside TRL with PEFT, in fresh processes on the same machine, model and rows.

    python -m benchmarks.train [--only starter,shape,peak,prefix,chats,whole] [--dtype bfloat16] [--quick]

Writes benchmarks/results/train/*.json and train.md. Tokens are real ones: padding does not count. "share of peak" is
useful work (see `benchmarks.one_step.useful`; recomputation does not count) over the rate of the best matrix product
right before and after the step, in the same dtype or in float32, whichever is faster here; the median of some steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console

from benchmarks.fresh import NO_DEADLINE, SHAPE, SHARED, Deadline, alpaca_rows, measure, short_chats
from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row


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

SHORT_CHATS = 4672
QUICK = 3  # settings; torch_compile takes minutes to begin


def against_trl(
    model: str,
    rows: int,
    dtype: str,
    settings: Mapping[str, dict[str, Any]] = TRL_SETTINGS,
    *,
    data: str | None = None,
    batch: int = 8,
    deadline: Deadline = NO_DEADLINE,
) -> list[Row]:
    """TRL in these settings, the first of which the ratios are to, and this project, on the same rows."""
    common = {"model": model, "data": data or alpaca_rows(), "rows": rows, "dtype": dtype}
    found = [{"what": name, **measure("trl", deadline, **common, **setting)} for name, setting in settings.items()]
    ours = measure("phinetune", deadline, **common, batch=batch, engine={})
    ours = {"what": f"phinetune, batch {batch}", **ours}
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


SHAPES = ((4, 256), (4, 1024), (1, 4096), (4, 4096), (1, 16384))  # chats and tokens a chat
QUICK_SHAPES = SHAPES[:3]
PEERS_UP_TO = 1024  # tokens a step; above, a peer's step takes minutes
PEERS = {"compiled": "transformers + PEFT, compiled", "plain": "transformers + PEFT"}


def peak(dtype: str, quick: bool) -> list[Row]:
    """Share of the peak at Phi-3 mini's shape with 4 layers, growth with the tokens of a step, and peers at 4 × 256."""
    rows: list[Row] = []
    for chats, length in QUICK_SHAPES if quick else SHAPES:
        peers = {} if quick or chats * length > PEERS_UP_TO else PEERS
        rows += at_shape(chats, length, dtype, peers)
    return rows


def at_shape(
    chats: int,
    length: int,
    dtype: str,
    peers: Mapping[str, str],
    deadline: Deadline = NO_DEADLINE,
    rounds: int | None = None,
) -> list[Row]:
    """A step of this many chats, all tokens labelled, by peers and by this project in turn, products between them.

    If a peer fails or takes too long, this project is measured alone.
    """
    counted = rounds or (5 if chats * length <= 4096 else 2)
    common = {"model": SHAPE, "chats": chats, "length": length, "dtype": dtype, "rounds": counted}
    seen = measure("paired", deadline, engines=[*peers, "fast"], **common)
    names = {way: f"{chats} × {length} tokens, {what}" for way, what in {**peers, "fast": "phinetune"}.items()}
    if "failed" in seen:
        alone = at_shape(chats, length, dtype, {}, deadline, rounds) if peers else [{"what": names["fast"], **seen}]
        return [*({"what": names[way], **seen} for way in peers), *alone]
    found: dict[str, Row] = seen["engines"]
    for row in found.values():
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
    ours = found["fast"]
    rest = ours["seconds"] * (1 - ours["attention_share"])
    ours["ms_a_token_without_attention"] = 1e3 * rest / ours["tokens"]
    ours |= {f"times {what}": found[way]["times"] for way, what in peers.items()}
    ours |= {} if peers else {"peak_gb": seen["peak_gb"]}
    for row in found.values():
        del row["times"]
    return [{"what": name, **found[way]} for way, name in names.items()]


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


def chats(dtype: str, quick: bool) -> list[Row]:
    """One epoch of short chats of about 96 tokens, batch 16, the starter, beside TRL; 4,672, or 192 with --quick."""
    from phinetune.checkpoints.starter import ensure_starter

    count = 192 if quick else SHORT_CHATS
    settings = {f"TRL, batch 16, {count:,} chats": {"batch": 16}}
    return against_trl(str(ensure_starter()), count, dtype, settings, data=short_chats(count), batch=16)


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
    "chats": chats,
    "whole": whole,
}


def cells(row: Row) -> list[str]:
    """A row as text: name, tokens/s, peak memory, first loss, ratio to the default, whatever else was found."""
    besides = [
        f"{k.replace('_', ' ')} {v:.2f}" for k, v in row.items() if v and k.startswith("times") and k != "times_default"
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


def meaning(name: str, part: Part) -> str:
    """What a part of this benchmark is."""
    return PARTS[name].__doc__ or ""


HEADINGS = ("", "tokens/s", "peak GB", "first loss", "× TRL's default", "besides")
BOOK = Book("train", "Training beside TRL with PEFT", HEADINGS, cells, meaning)


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
        console.print(BOOK.table(name, rows))
        about = machine("bfloat16" if name == "whole" else options.dtype)
        written = BOOK.keep({name: {"machine": about, "rows": rows}})
    console.print(f"Wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
