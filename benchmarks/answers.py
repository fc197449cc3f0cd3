"""Answers at 1, 8 and 64 prompts at once, beside transformers and llama.cpp, the same weights, in one run.

    python -m benchmarks.answers [--only 1,8,64] [--models starter,mini] [--limit 32] [--dtype bfloat16]

The starter without an adapter, and four layers of Phi-3 mini's shape, where reading the weights takes most of the time;
prompts of the demo, for the second with other ids in the places of these. No token ends an answer, so everybody makes
as many; the time counts the reading of the prompts. llama.cpp (xllamacpp) gets the weights in the same 16 bits and in
q8_0, in GGUF files of this project's own; phinetune has its weights in q8_0, too. "same" is the share of answers that
are token by token those of transformers: in 16 bits, two tokens may be equally likely. Writes
benchmarks/results/answers/*.json and answers.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.fresh import SHAPE, measure
from benchmarks.generate import write_prompts
from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row

COUNTS = (1, 8, 64)
FEWEST = 250  # ids that any made-up vocabulary has
MODELS = {"starter": "starter", "mini": SHAPE}
TITLES = {"starter": "", "mini": ", Phi-3 mini's shape"}  # after how many answer at once
KINDS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # of GGUF files
HEADINGS = ("", "tokens/s", "peak GB", "× transformers", "same", "besides")


def write_file(folder: Path, name: str, kind: str) -> str:
    """A model as a GGUF file."""
    from phinetune.checkpoints.starter import ensure_starter
    from phinetune.exporting.checkpoint_source import open_checkpoint
    from phinetune.exporting.gguf.model import write_gguf

    file = folder / f"{name}-{kind}.gguf"
    write_gguf(open_checkpoint(str(ensure_starter()) if name == "starter" else MODELS[name]), file, kind, name)
    return str(file)


def at_once(name: str, count: int, limit: int, dtype: str, files: dict[str, str]) -> list[Row]:
    """Everybody on the first `count` prompts, all together."""
    prompts = write_prompts(count)
    if name != "starter":
        file = Path(prompts)
        file.write_text(json.dumps([[3 + token % FEWEST for token in ids] for ids in json.loads(file.read_text())]))
    common: dict[str, Any] = {"prompts": prompts, "limit": limit}
    ours = {**common, "model": MODELS[name], "dtype": dtype, "adapter": False, "endless": True, "batch": None}
    rows = [
        {"what": "transformers", **measure("generate", way="transformers", **ours)},
        {"what": "phinetune", **measure("generate", way="phinetune", **ours)},
        {"what": "phinetune, q8_0", **measure("generate", way="phinetune", weights="q8_0", **ours)},
        *({"what": f"llama.cpp, {kind}", **measure("llama", gguf=file, **common)} for kind, file in files.items()),
    ]
    if not files:
        rows.append({"what": "llama.cpp", "failed": "xllamacpp is not installed"})
    theirs = rows[0].get("answers")
    for row in rows:
        answers = row.pop("answers", None)
        if theirs and answers:
            row["same"] = sum(a == b for a, b in zip(answers, theirs, strict=True)) / len(theirs)
            row["times"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    if "failed" in row:
        return [row["what"], "", "", "", "", row["failed"]]
    return [
        row["what"],
        f"{row['tokens_per_s']:.0f}",
        f"{row['peak_gb']:.1f}",
        f"{row['times']:.2f}" if "times" in row else "",
        f"{row['same']:.0%}" if "same" in row else "",
        f"{row['seconds']:.1f} s",
    ]


def meaning(name: str, part: Part) -> str:
    """How many are answered together."""
    count, _, rest = name.partition(" at once")
    what = "four layers of Phi-3 mini's shape" if rest else "the starter"
    return f"{count} prompts of the demo together, {part['limit']} tokens each, {what}."


BOOK = Book("answers", "Answers beside transformers and llama.cpp", HEADINGS, cells, meaning)


def main() -> None:
    """Run the parts, print a table after each, write the results."""
    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--only", default=",".join(map(str, COUNTS)))
    cli.add_argument("--models", default=",".join(MODELS))
    cli.add_argument("--limit", type=int, default=32)
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    options = cli.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        kinds = (KINDS[options.dtype], "q8_0") if find_spec("xllamacpp") else ()
        for name in options.models.split(","):
            files = {kind: write_file(Path(folder), name, kind) for kind in kinds}
            for count in map(int, options.only.split(",")):
                title = f"{count} at once{TITLES[name]}"
                rows = at_once(name, count, options.limit, options.dtype, files)
                console.print(BOOK.table(title, rows))
                part = {"machine": machine(options.dtype), "limit": options.limit, "rows": rows}
                console.print(f"Wrote {' and '.join(map(str, BOOK.keep({title: part})))}")


if __name__ == "__main__":
    main()
