"""Does `phinetune curve` foretell the last doubling? Ten small sets, each with its forecast and what came.

    python -m benchmarks.curve [--work runs/bench-curve] [--only demo,sums] [--seeds 0,1] [--model starter] [--rows 192]

For each set the curve trains on an eighth, a quarter, half and all of 192 rows, with the settings that the rules
choose. The gain of the last doubling is foretold from the three runs before it, and held against its own 90% interval.
The bar: inside in eight of ten sets. Another seed draws other rows into the shares, and trains in another order.

What is finished stays in `--work`, so the benchmark may be stopped at any time and called again: a set goes on where it
stopped, inside a run as well. Writes benchmarks/results/curve.json and curve.md, after each set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.curve_sets import HELD_OUT, SETS, TRAIN, write_set
from benchmarks.machine import instruction_set

RESULTS = Path(__file__).resolve().parent / "results"


def measure(name: str, work: Path, model: str, rows: int, held_out: int, seed: int) -> dict[str, Any] | None:
    """The curve of a set; None if it was asked to stop. `seed`: which rows each share has, and their order."""
    import phinetune

    train, others = write_set(name, work / "data", rows, held_out)
    folder = work / (f"{name}-{seed}" if seed else name)
    began = time.monotonic()
    made = phinetune.curve(
        model,
        {"train": str(train), "eval": str(others), "seed": seed},
        training_config={"output_dir": str(folder), **({"seed": seed} if seed else {})},
        out=folder,
    )
    if made.stopped:
        return None
    tree = made.results
    return {
        "set": name,
        "seed": seed,
        "rows": [point["rows"] for point in tree["points"]],
        "steps": [point["steps"] for point in tree["points"]],
        "base": tree["base"],
        "losses": [point["loss"] for point in tree["points"]],
        **{key: tree["check"][key] for key in ("low", "high", "gain", "inside")},
        "forecast": tree["forecast"]["text"],
        "seconds": round(sum(point["seconds"] for point in tree["points"])),
        "seconds_of_this_call": round(time.monotonic() - began),
    }


def write(found: dict[tuple[int, str], dict[str, Any]], model: str) -> None:
    """The results, by seed and set, as JSON and as a table."""
    rows = [found[seed, name] for seed in sorted({seed for seed, _ in found}) for name in SETS if (seed, name) in found]
    inside = sum(row["inside"] for row in rows)
    tree = {"model": model, "instructions": instruction_set(), "inside": inside, "of": len(rows), "sets": rows}
    (RESULTS / "curve.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# The last doubling, foretold",
        "",
        f"Written by `python -m benchmarks.curve`: {model}, {tree['instructions']}. Inside its 90% interval in "
        f"{inside} of {len(rows)} curves.",
        "",
        "| set | seed | rows | held-out loss, base and runs | gain foretold | gain | |",
        "|---|---:|---|---|---|---:|---|",
    ]
    for row in rows:
        losses = ", ".join(f"{loss:.3f}" for loss in [row["base"], *row["losses"]])
        span = f"{row['low']:+.3f} to {row['high']:+.3f}"
        counts = ", ".join(map(str, row["rows"]))
        verdict = "" if row["inside"] else "outside"
        lines.append(
            f"| {row['set']} | {row['seed']} | {counts} | {losses} | {span} | {row['gain']:+.3f} | {verdict} |"
        )
    (RESULTS / "curve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the sets one after the other."""
    cli = argparse.ArgumentParser()
    cli.add_argument("--work", type=Path, default=Path("runs/bench-curve"))
    cli.add_argument("--only", default=",".join(SETS))
    cli.add_argument("--seeds", default="0")
    cli.add_argument("--model", default="starter")
    cli.add_argument("--rows", type=int, default=TRAIN)
    cli.add_argument("--held-out", type=int, default=HELD_OUT)
    cli.add_argument("--keep", action="store_true", help="write no results: a trial")
    given = cli.parse_args()
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for seed, name in itertools.product(map(int, given.seeds.split(",")), given.only.split(",")):
        row = measure(name, given.work, given.model, given.rows, given.held_out, seed)
        if row is None:
            print(f"stopped in {name}; call it again to go on")
            return
        found[seed, name] = row
        print(json.dumps(row))
        if not given.keep:
            write(found, given.model)


if __name__ == "__main__":
    main()
