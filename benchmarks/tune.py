"""What a race of three learning rates costs beside the one run at the rule's rate, and which rate it chose.

    python -m benchmarks.tune [--model starter] [--rows 420] [--steps 80]

The demo's chats, and a run as it is by default: evaluations by the rules, base and tuned model compared at the end.
Each run begins in a fresh process, so loading counts on both sides. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

RESULTS = Path(__file__).resolve().parent / "results" / "tune.json"
DEMO = Path(__file__).resolve().parents[1] / "src" / "phinetune" / "demo_data"


def one(rate: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in this process."""
    from phinetune.api.train import train_config
    from phinetune.config.run import make_config
    from phinetune.screen.console import stderr

    began = time.perf_counter()
    steps = {} if options.steps is None else {"max_steps": options.steps}
    config = {
        "model": {"path": options.model},
        "data": {"train": str(DEMO / "train.jsonl"), "eval": str(DEMO / "heldout.jsonl"), "limit": options.rows},
        "training_config": {"output_dir": str(folder / rate), "learning_rate": rate, "seed": 0, **steps},
        "evaluation": {"max_new_tokens": 40, "max_prompts": 20},
    }
    run = train_config(make_config(config), stderr())
    training, tuned = run.results["training"], run.results["evaluation"]["tuned"]
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "training_seconds": training["seconds"], "steps": training["steps"]}
    if (run.path / "tune.json").is_file():
        found["tune"] = json.loads((run.path / "tune.json").read_text(encoding="utf-8"))
    return found | {"loss": tuned["loss"]}


def fresh(rate: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in a fresh process."""
    own = ["--one", rate, "--folder", str(folder), "--model", options.model, "--rows", str(options.rows)]
    own += [] if options.steps is None else ["--steps", str(options.steps)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", *own], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Both runs, and how much longer the race's took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--rows", type=int, default=420)
    parser.add_argument("--steps", type=int, default=None, help="else epochs by the rule")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {rate: fresh(rate, options, Path(folder)) for rate in ("auto", "race")}
    more = found["race"]["seconds"] / found["auto"]["seconds"] - 1
    tree = {"machine": machine("bfloat16"), "model": options.model, "rows": options.rows, "more": more, **found}
    options.out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    for rate, run in found.items():
        print(f"{rate}: {run['seconds']:.1f} s, {run['steps']} steps, held-out loss {run['loss']:.4f}")
    print(f"the race took {more:.1%} more time; {found['race']['tune']['why'][0]}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
