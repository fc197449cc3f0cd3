"""Writes examples/data from the demo's chats, in the forms that the examples read.

python tools/make_example_data.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "phinetune" / "demo_data"
TARGET = ROOT / "examples" / "data"
ROWS = {"train": 240, "heldout": 32}
FROM = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """`conversations` with `from` and `value`."""
    return {"conversations": [{"from": FROM[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}


def alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """`instruction`, `input`, `output`; the shop's system message is the instruction."""
    system, user, assistant = (turn["content"] for turn in row["messages"])
    return {"instruction": system, "input": user, "output": assistant}


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "messages": lambda row: row,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
}


def single(rows: list[dict[str, Any]], turns: int, key: str, count: int) -> list[dict[str, Any]]:
    """The first rows whose conversation under `key` has so many turns: those of one exchange."""
    return [row for row in rows if len(row[key]) == turns][:count]


def texts() -> dict[str, str]:
    """What each file holds, by its name."""
    made = {}
    for part, count in ROWS.items():
        rows = single(read(part), 3, "messages", count)
        for form, convert in FORMS.items():
            made[f"shop_{form}_{part}.jsonl"] = written([convert(row) for row in rows])
    made["shop_styles_train.jsonl"] = written(single(read("styles"), 3, "messages", ROWS["train"]))
    for source, part in (("pairs", "train"), ("pairs_heldout", "heldout")):
        made[f"shop_pairs_{part}.jsonl"] = written(single(read(source), 2, "prompt", ROWS[part]))
    return made


def read(name: str) -> list[dict[str, Any]]:
    """The rows of one of the demo's files."""
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def written(rows: list[dict[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (TARGET / name).write_text(text, encoding="utf-8")
        print(f"Wrote {TARGET / name}")
