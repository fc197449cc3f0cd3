"""What `phinetune plan` predicts beside what the run then takes, each in a fresh process.

    python -m benchmarks.plan [--only starter,shape,nf4,recomputed] [--steps 8]

Writes benchmarks/results/plan/*.json and plan.md. Memory is the peak while training (VmHWM, reset at the first step)
less what the program held before the model was loaded, its data included; time is that of training alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.fresh import SHAPE, alpaca_rows
from benchmarks.machine import instruction_set, machine
from benchmarks.store import HERE, Book, Part, Row

HEADINGS = ("", "steps", "memory GB", "predicted", "off by", "seconds", "predicted", "off by", "measured")
CASES: dict[str, Row] = {
    "starter": {"model": {"path": "starter"}, "batch": 8},
    "shape": {"model": {"path": SHAPE}, "batch": 4},
    "nf4": {"model": {"path": SHAPE, "quantization": "nf4"}, "batch": 4},
    "recomputed": {"model": {"path": SHAPE}, "batch": 8, "engine": {"activation_memory": "all"}},
}


def configuration(case: str, steps: int, folder: str) -> Row:
    """The configuration of a case, as a run's YAML file has it."""
    about = CASES[case]
    return {
        "model": about["model"],
        "data": {"train": alpaca_rows(), "limit": steps * about["batch"]},  # an epoch: plan and run have one's rows
        "engine": about.get("engine", {}),
        "peft_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training_config": {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": about["batch"],
            "save_strategy": "no",
            "max_length": 1024,
        },
    }


def predicted(tree: Row) -> Row:
    """The plan."""
    from phinetune.config.run import make_config
    from phinetune.logs import quiet_libraries
    from phinetune.planning.plan import make_plan

    quiet_libraries()
    plan = make_plan(make_config(tree))
    return {"bytes": plan.memory.total, "seconds": plan.seconds, "parts": plan.memory.to_dict()}


def measured(tree: Row) -> Row:
    """The run."""
    from peft import PeftModel
    from torch.nn.modules.module import register_module_forward_pre_hook

    from phinetune.chats.encoder import make_encoder
    from phinetune.checkpoints.tokenizer import open_tokenizer
    from phinetune.config.run import make_config
    from phinetune.data.prepare.build_sets import build_chats
    from phinetune.data.prepare.encode_rows import RowEncoder
    from phinetune.logs import quiet_libraries
    from phinetune.training.prepare import prepare_run, settle
    from phinetune.training.run import open_place, train_run

    quiet_libraries()
    config = make_config(tree)
    chats = build_chats(RowEncoder(config.data, make_encoder(open_tokenizer(config.model)), 1024))
    before = _status("VmRSS")
    begun: list[int] = []

    def first_step(module: Any, _: Any) -> None:
        if isinstance(module, PeftModel) and not begun:
            begun.append(_status("VmRSS"))
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    register_module_forward_pre_hook(first_step)
    trained = train_run(prepare_run(settle(config)), open_place(config))
    assert len(chats.train)
    return {"bytes": _status("VmHWM") - before, "seconds": trained.summary["seconds"], "loaded": begun[0] - before}


def _status(key: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024


def in_process(kind: str, tree: Row) -> Row:
    """One of the two in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--worker", kind, json.dumps(tree)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def compare(case: str, steps: int) -> Row:
    """Both, and how far they lie apart."""
    with tempfile.TemporaryDirectory() as folder:
        tree = configuration(case, steps, f"{folder}/run")
        plan, run = in_process("predicted", tree), in_process("measured", tree)
    apart = {key: plan[key] / run[key] - 1 for key in ("bytes", "seconds")}
    return {"what": case, "steps": steps, "plan": plan, "run": run, "off": apart}


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    plan, run, off = row["plan"], row["run"], row["off"]
    memory = [f"{one['bytes'] / 1e9:.2f}" for one in (run, plan)]
    seconds = [f"{one['seconds']:.1f}" for one in (run, plan)]
    offs = [f"{off[key]:+.0%}" for key in ("bytes", "seconds")]
    return [row["what"], str(row["steps"]), *memory, offs[0], *seconds, offs[1], row["date"]]


def meaning(name: str, part: Part) -> str:
    """What is compared."""
    return "The plan's peak of memory and its seconds of training beside what the run took."


BOOK = Book("plan", "What a plan predicts and what the run takes", HEADINGS, cells, meaning)


def keep(rows: list[Row]) -> list[Path]:
    """Write the cases; those of this instruction set that were not run now stay."""
    about = machine("auto")
    before = BOOK.sides().get(instruction_set(), {}).get("cases", {"rows": []})["rows"]
    cases = {row["what"]: row for row in before} | {row["what"]: {**row, "date": about["date"]} for row in rows}
    return BOOK.keep({"cases": {"machine": about, "rows": list(cases.values())}})


def main() -> None:
    """Run the cases, print a table, write the results."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps({"predicted": predicted, "measured": measured}[sys.argv[2]](json.loads(sys.argv[3]))))
        return
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--only", default=",".join(CASES))
    cli.add_argument("--steps", type=int, default=8)
    options = cli.parse_args()
    rows = [compare(case, options.steps) for case in options.only.split(",")]
    console = Console()
    console.print(BOOK.table("plan and run", [{**row, "date": "now"} for row in rows]))
    console.print(f"Wrote {' and '.join(map(str, keep(rows)))}")


if __name__ == "__main__":
    main()
