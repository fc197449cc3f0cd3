"""Greedy answers beside transformers' `generate`, in fresh processes on the same machine, model and prompts.

    python -m benchmarks.generate [--prompts 200] [--limit 128] [--only adapter,base] [--dtype bfloat16] [--quick]

The prompts are the demo's, in the order of its files. Answers end at the model's stop tokens or at `--limit` tokens;
tokens are counted up to there, padding and what a batch computes past an answer's end are not. Writes
benchmarks/results/generate/*.json and generate.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.fresh import measure
from benchmarks.machine import machine
from benchmarks.store import HERE, Book, Part, Row

# transformers in its default use: one call over all prompts, or one a prompt; batches are what people do next.
WAYS: dict[str, dict[str, Any]] = {
    "transformers, one padded batch": {"way": "transformers", "batch": None},
    "transformers, one by one": {"way": "transformers", "batch": 1},
    "transformers, batches of 16": {"way": "transformers", "batch": 16},
    "phinetune": {"way": "phinetune", "batch": None},
}
PARTS = {"adapter": True, "base": False}  # under a LoRA, PEFT's own layers beside this project's; or without one


def write_prompts(count: int) -> str:
    """The first prompts of the demo's chats, held-out ones first, as token ids in a JSON file."""
    from phinetune.chats.encoder import make_encoder
    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection

    encoder = make_encoder(load_base(ModelSection(path="starter")).tokenizer, "assistant", "keep")
    demo = HERE.parent / "src" / "phinetune" / "demo_data"
    lines = [line for name in ("heldout", "train") for line in (demo / f"{name}.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in lines[:count]]
    file = Path(tempfile.mkdtemp()) / "prompts.json"
    file.write_text(json.dumps([encoder.prompt_ids(chat[:-1]) for chat in chats]))
    return str(file)


def part(prompts: str, limit: int, dtype: str, adapter: bool) -> list[Row]:
    """Every way on the same prompts; `same` is the share of answers that are token by token those one by one."""
    common = {"model": "starter", "prompts": prompts, "limit": limit, "dtype": dtype, "adapter": adapter}
    rows = [{"what": name, **measure("generate", **common, **way)} for name, way in WAYS.items()]
    alone = next(row for row in rows if row["what"].endswith("one by one")).get("answers")
    ours = rows[-1]
    for row in rows:
        answers = row.pop("answers", None)
        if alone and answers:
            row["same"] = sum(a == b for a, b in zip(answers, alone, strict=True)) / len(alone)
        if "seconds" in row and "seconds" in ours:
            row["times"] = row["seconds"] / ours["seconds"]
    return rows


def cells(row: Row) -> list[str]:
    """A row as text: name, seconds, tokens/s, peak memory, how many times phinetune's time, like answers."""
    if "failed" in row:
        return [row["what"], row["failed"], "", "", "", ""]
    return [
        row["what"],
        f"{row['seconds']:.1f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['peak_gb']:.1f}",
        f"{row['times']:.2f}" if "times" in row else "",
        f"{row['same']:.0%}" if "same" in row else "",
    ]


HEADINGS = ("", "seconds", "tokens/s", "peak GB", "× phinetune's time", "as one by one")


def meaning(name: str, part: Part) -> str:
    """What was answered."""
    under = "under a new LoRA" if PARTS.get(name) else "without an adapter"
    return f"{part['prompts']} prompts of the demo, at most {part['limit']} tokens an answer, the starter {under}."


BOOK = Book("generate", "Answering beside transformers", HEADINGS, cells, meaning)


def main() -> None:
    """Run the parts, print a table after each, write the results."""
    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--prompts", type=int, default=200)
    cli.add_argument("--limit", type=int, default=128)
    cli.add_argument("--only", default=",".join(PARTS))
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    cli.add_argument("--quick", action="store_true", help="24 prompts, 16 tokens an answer; writes nothing")
    options = cli.parse_args()
    count, limit = (24, 16) if options.quick else (options.prompts, options.limit)
    prompts, console = write_prompts(count), Console()
    for name in options.only.split(","):
        rows = part(prompts, limit, options.dtype, PARTS[name])
        console.print(BOOK.table(f"{name}: {count} prompts, at most {limit} tokens an answer", rows))
        if not options.quick:
            about = {"machine": machine(options.dtype), "prompts": count, "limit": limit}
            console.print(f"Wrote {' and '.join(map(str, BOOK.keep({name: {**about, 'rows': rows}})))}")


if __name__ == "__main__":
    main()
