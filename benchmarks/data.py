"""Preparing data beside TRL, in fresh processes on the same machine, tokenizer and rows; memory of a large set.

    python -m benchmarks.data [--only starter,phi3,million,columns] [--rows 20000] [--million 1000000] [--quick]

Writes benchmarks/results/data.json and data.md. Rows are Alpaca's, repeated, each with a number of its own so that
none is the same. Ours is timed from the file to what the trainer takes, reading included and nothing kept from before;
TRL from a data set that is already in memory-mapped Arrow, its own preparation alone (template, tokens, labels,
truncation), with as many processes. "resident" is the most that all processes of a run held at a time: pages that
several share are counted once (proportional set size), and the sum of what each says alone stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.train import HERE, RESULTS, SHARED, alpaca_rows, machine

Row = dict[str, Any]
LENGTH = 1024
HEADINGS = ("", "rows/s", "tokens/s", "× TRL", "resident GB", "sum of RSS GB", "processes", "besides")


def write_rows(file: Path, count: int) -> None:
    """`count` rows of Alpaca's, each with a number of its own."""
    rows = json.loads(Path(alpaca_rows()).read_text())
    with file.open("w") as out:
        for i in range(count):
            row = rows[i % len(rows)]
            asked = f"({i}) {row['instruction']}" + (f"\n{row['input']}" if row["input"] else "")
            turns = [{"role": "user", "content": asked}], [{"role": "assistant", "content": row["output"]}]
            out.write(json.dumps({"prompt": turns[0], "completion": turns[1]}) + "\n")


def write_columns(file: Path, count: int, names: tuple[str, str]) -> None:
    """The same rows with question and answer as texts under two names, and two columns that nothing uses."""
    rows = json.loads(Path(alpaca_rows()).read_text())
    with file.open("w") as out:
        for i in range(count):
            row = rows[i % len(rows)]
            pair = dict(zip(names, (f"({i}) {row['instruction']}", row["output"]), strict=True))
            out.write(json.dumps({"id": f"row {i}", **pair, "lang": "en"}) + "\n")


def ours(tokenizer: str, file: str, processes: int, **data: Any) -> Row:
    """This project's preparation: the file to ids and labels on disk. `data`: more keys of the section."""
    from phinetune.chats.encoder import make_encoder
    from phinetune.checkpoints.tokenizer import open_tokenizer
    from phinetune.config.data import DataSection
    from phinetune.config.model import ModelSection
    from phinetune.data.prepare.build_sets import build_chats
    from phinetune.data.prepare.encode_rows import RowEncoder
    from phinetune.logs import quiet_libraries

    quiet_libraries()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:processes]))
    encoder = make_encoder(open_tokenizer(ModelSection(path=tokenizer)))
    start = time.perf_counter()
    report = build_chats(RowEncoder(DataSection(train=file, **data), encoder, LENGTH)).train.report
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "rows": report.rows,
        "kept": report.kept,
        "tokens": report.tokens,
        "labels": report.trainable_tokens,
    }


def trl(tokenizer: str, file: str, processes: int) -> Row:
    """TRL's preparation of the same rows as prompts and completions."""
    import pyarrow.compute
    from datasets import load_dataset
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from phinetune.logs import quiet_libraries

    quiet_libraries()
    spent: list[float] = []

    class Timed(SFTTrainer):
        """The trainer, its preparation timed."""

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            made = super()._prepare_dataset(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return made

    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:processes]))
    words = AutoTokenizer.from_pretrained(tokenizer, config=Phi3Config())
    words.pad_token = words.pad_token or words.eos_token
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = Phi3ForCausalLM(Phi3Config(vocab_size=len(words) + 64, num_key_value_heads=2, pad_token_id=0, **shape))
    work = tempfile.mkdtemp()
    data = load_dataset("json", data_files=file, split="train", cache_dir=work)
    args = SFTConfig(
        work, dataset_num_proc=processes, max_length=LENGTH, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = Timed(model=tiny, args=args, train_dataset=data, processing_class=words)
    labels = trainer.train_dataset.data.column("labels").combine_chunks().flatten()
    shutil.rmtree(work, ignore_errors=True)
    return {
        "seconds": spent[0],
        "rows": len(data),
        "kept": len(trainer.train_dataset),
        "tokens": len(labels),
        "labels": int(pyarrow.compute.sum(pyarrow.compute.not_equal(labels, -100)).as_py()),
    }


KINDS: dict[str, Callable[..., Row]] = {"ours": ours, "trl": trl}


def measure(kind: str, **options: Any) -> Row:
    """One preparation in a fresh process with an empty cache; its memory is watched meanwhile."""
    command = [sys.executable, "-m", "benchmarks.data", "--worker", kind, json.dumps(options)]
    with tempfile.TemporaryDirectory() as home:
        # The starter model stays where it is; what is prepared goes into a folder of this measurement's.
        done = subprocess.Popen(
            command,
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PHINETUNE_HOME": home, "HF_HOME": home},
        )
        peak = _watch(done)
        out, problems = done.communicate()
    if done.returncode:
        return {"failed": (problems.strip().splitlines() or ["no message"])[-1], **options}
    row: Row = json.loads(out.strip().splitlines()[-1])
    rates = {"rows_per_s": row["rows"] / row["seconds"], "tokens_per_s": row["tokens"] / row["seconds"]}
    return {**row, **rates, **peak, "processes": options["processes"]}


def _watch(done: subprocess.Popen[str]) -> Row:
    """The most that a process and its children held at a time, in GB."""
    resident = alone = 0
    while done.poll() is None:
        shared = single = 0
        for one in _family(done.pid):
            try:
                full = one.memory_full_info()
            except (psutil.Error, OSError):
                continue
            shared, single = shared + full.pss, single + full.rss
        resident, alone = max(resident, shared), max(alone, single)
        time.sleep(0.25)
    return {"resident_gb": resident / 1e9, "rss_gb": alone / 1e9}


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def beside_trl(tokenizer: str, rows: int, processes: int) -> list[Row]:
    """Both on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, rows)
        theirs, mine = (
            {"what": name, **measure(kind, tokenizer=tokenizer, file=str(file), processes=processes)}
            for name, kind in (("TRL", "trl"), ("phinetune", "ours"))
        )
    if "seconds" in theirs and "seconds" in mine:
        mine["times_trl"] = mine["rows_per_s"] / theirs["rows_per_s"]
        alike = all(mine[key] == theirs[key] for key in ("tokens", "labels"))
        mine["besides"] = "as many tokens and labels" if alike else "other tokens: TRL cuts answers, we never do"
    return [theirs, mine]


def starter(options: argparse.Namespace) -> list[Row]:
    """The starter's tokenizer (byte-level BPE)."""
    from phinetune.checkpoints.starter import ensure_starter

    return beside_trl(str(ensure_starter()), options.rows, options.processes)


def phi3(options: argparse.Namespace) -> list[Row]:
    """Phi-3's own tokenizer (SentencePiece BPE), where it is at hand."""
    folder = SHARED / "phi3-tokenizer"
    return beside_trl(str(folder), options.rows, options.processes) if folder.is_dir() else []


def million(options: argparse.Namespace) -> list[Row]:
    """A million rows: memory stays flat."""
    from phinetune.checkpoints.starter import ensure_starter

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.million)
        row = measure("ours", tokenizer=str(ensure_starter()), file=str(file), processes=options.processes)
        return [
            {"what": f"phinetune, {options.million:,} rows", **row, "besides": f"{file.stat().st_size / 1e6:.0f} MB"}
        ]


def columns(options: argparse.Namespace) -> list[Row]:
    """Rows whose columns have names of their own, beside the same rows in a known form: medians of paired runs."""
    from phinetune.checkpoints.starter import ensure_starter

    mappings: dict[str, Row] = {
        "a known form": {},
        "columns": {"columns": {"user": "question", "assistant": "answer"}},
        "templates": {"prompt": "{question}", "completion": "{answer}", "system_text": None},
    }
    with tempfile.TemporaryDirectory() as folder:
        known, own = Path(folder) / "known.jsonl", Path(folder) / "own.jsonl"
        write_columns(known, options.mapped, ("prompt", "completion"))
        write_columns(own, options.mapped, ("question", "answer"))
        found: dict[str, list[Row]] = {name: [] for name in mappings}
        common = {"tokenizer": str(ensure_starter()), "processes": options.processes}
        for _ in range(options.pairs):
            for name, mapping in mappings.items():
                file = str(own if mapping else known)
                found[name].append(measure("ours", file=file, **common, **mapping))
    medians = {
        name: sorted(rows, key=lambda row: row.get("seconds", 0))[len(rows) // 2] for name, rows in found.items()
    }
    first = medians["a known form"]
    return [
        {
            "what": f"{name}, {options.mapped:,} rows",
            **row,
            "besides": row.get("failed")
            or f"{row['seconds'] / first['seconds']:.3f} × the time of a known form, {row['tokens'] - first['tokens']} "
            "tokens more",
        }
        for name, row in medians.items()
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "starter": starter,
    "phi3": phi3,
    "million": million,
    "columns": columns,
}


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""

    def shown(key: str, form: str) -> str:
        return form.format(row[key]) if row.get(key) is not None else ""

    return [
        row["what"],
        shown("rows_per_s", "{:,.0f}"),
        shown("tokens_per_s", "{:,.0f}"),
        shown("times_trl", "{:.2f}"),
        shown("resident_gb", "{:.2f}"),
        shown("rss_gb", "{:.2f}"),
        shown("processes", "{}"),
        str(row.get("failed", row.get("besides", ""))),
    ]


def write(name: str, rows: list[Row]) -> None:
    """results/data.json, and data.md for people; parts that were not run now are kept from before."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "data.json"
    parts = json.loads(file.read_text())["parts"] if file.is_file() else {}
    parts[name] = {"machine": machine("none"), "rows": rows}
    file.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    lines = ["# Preparing data beside TRL", "", "Written by `python -m benchmarks.data`, which says how."]
    for one, part in parts.items():
        m = part["machine"]
        lines += ["", f"## {one}", "", (PARTS[one].__doc__ or "").strip()]
        lines += [f"Measured {m['date']} on {m['processor']} ({m['instructions']}).", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in part["rows"]]
    (RESULTS / "data.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the parts, print a table after each, write the results."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(KINDS[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--only", default=",".join(PARTS))
    cli.add_argument("--rows", type=int, default=20_000)
    cli.add_argument("--mapped", type=int, default=100_000, help="rows with columns of their own")
    cli.add_argument("--pairs", type=int, default=3, help="times that each of them is prepared")
    cli.add_argument("--million", type=int, default=1_000_000, help="rows of the large set")
    cli.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    cli.add_argument("--quick", action="store_true", help="fewer rows")
    options = cli.parse_args()
    if options.quick:
        options.rows, options.million, options.mapped = 6_000, 50_000, 6_000
    console = Console()
    for name in options.only.split(","):
        rows = PARTS[name](options)
        table = Table(*HEADINGS, title=name)
        for row in rows:
            table.add_row(*cells(row))
        console.print(table)
        write(name, rows)
    console.print(f"Wrote {RESULTS / 'data.md'} and data.json")


if __name__ == "__main__":
    main()
