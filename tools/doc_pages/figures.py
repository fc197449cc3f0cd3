"""The figures of docs/, drawn from the results in benchmarks/results and from a demo run's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doc_pages.drawing import WIDTH, Figure
from doc_pages.filling import DOCS, LANGUAGES
from doc_pages.words import said

RESULTS = DOCS.parent / "benchmarks" / "results"
FOLDER = DOCS / "figures"
DEMO = Path(__file__).with_name("demo_differences.json")
GB = 1e9


def _part(bench: str, part: str, instructions: str = "avx512-bf16") -> dict[str, Any]:
    tree = json.loads((RESULTS / bench / f"{instructions}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = tree["parts"][part]
    return found


def _source(bench: str, found: dict[str, Any], language: str) -> str:
    machine = found["machine"]
    words = said("Source: benchmarks/results/{bench}.md; {processor}, {threads} threads, {date}", language)
    for key, value in {**machine, "bench": bench}.items():
        words = words.replace(f"{{{key}}}", str(value))
    return words


def engine_speed(language: str) -> str:
    """Tokens a second beside TRL, on the same rows."""
    starter, shape = _part("train", "starter"), _part("train", "shape")
    machines = [starter["machine"], shape["machine"]]
    both = {
        key: " / ".join(dict.fromkeys(str(one[key]) for one in machines)) for key in ("processor", "threads", "date")
    }
    figure = Figure(said("Tokens a second on the same rows", language), _source("train", {"machine": both}, language))
    for heading, part in (("The starter model, 64 rows", starter), ("Four layers of Phi-3 mini, 16 rows", shape)):
        figure.heading(f"{said(heading, language)} ({part['machine']['processor']})")
        ran = [row for row in part["rows"] if "tokens_per_s" in row]  # a peer may not have done it in time
        rows = [row for row in ran if row["what"].startswith(("TRL", "phinetune, batch"))]
        rows.sort(key=lambda row: float(row["tokens_per_s"]))
        figure.bars(
            [
                (
                    said(row["what"], language),
                    row["tokens_per_s"],
                    f"{row['tokens_per_s']:.0f}",
                    "ours" if row["what"].startswith("phinetune") else "theirs",
                )
                for row in rows
            ]
        )
        figure.y += 8
    return figure.svg()


def engine_memory(language: str) -> str:
    """What a plan says of a run's peak, and what the run took."""
    found = _part("plan", "cases")
    figure = Figure(said("Memory at the peak, GB: planned and taken", language), _source("plan", found, language))
    top = max(max(row["plan"]["bytes"], row["run"]["bytes"]) for row in found["rows"]) / GB
    names = {
        "starter": "the starter model",
        "shape": "four layers of Phi-3 mini",
        "nf4": "the same in NF4",
        "recomputed": "the same, long chats, recomputed",
    }
    for row in found["rows"]:
        figure.heading(said(names[row["what"]], language))
        planned, taken = row["plan"]["bytes"] / GB, row["run"]["bytes"] / GB
        figure.bars(
            [
                (said("planned", language), planned, f"{planned:.2f}", "third"),
                (said("taken", language), taken, f"{taken:.2f}", "ours"),
            ],
            top,
        )
    return figure.svg()


def shared_layout(language: str) -> str:
    """How three chats with one beginning lie in a packed row, and what each of them attends to."""
    figure = Figure(said("Three chats with one system prompt in a packed row", language), said("A sketch", language))
    figure.heading(said("Row by row: the beginning is computed three times", language))
    replies = (110.0, 70.0, 140.0)
    for i, reply in enumerate(replies):
        figure.box(24, figure.y + 4, 240, 22, "theirs")
        figure.box(266, figure.y + 4, reply, 22, "ours")
        figure.text(32, figure.y + 20, said("system prompt", language), "on")
        figure.text(272, figure.y + 20, said("chat {n}", language).replace("{n}", str(i + 1)), "on")
        figure.y += 30
    figure.y += 8
    figure.heading(said("Packed: the beginning is computed once, and each chat attends to it and to itself", language))
    base, x = figure.y + 46, 266.0
    figure.box(24, base, 240, 22, "theirs")
    figure.text(32, base + 16, said("system prompt", language), "on")
    for i, reply in enumerate(replies):
        figure.box(x, base, reply, 22, "ours")
        figure.text(x + 6, base + 16, said("chat {n}", language).replace("{n}", str(i + 1)), "on")
        middle = x + reply / 2
        arc = f"M{middle:.0f},{base:g} C{middle:.0f},{base - 34 - 6 * i:g} 144,{base - 34 - 6 * i:g} 144,{base - 2:g}"
        figure.marks.append(f'<path d="{arc}" class="trace" fill="none" stroke-width="1.5"/>')
        x += reply + 2
    figure.y = base + 34
    return figure.svg()


def shared_gain(language: str) -> str:
    """Speed and memory with and without sharing."""
    found = _part("train", "prefix")
    title = "Sixteen replies under one system prompt of 600 tokens"
    figure = Figure(said(title, language), _source("train", found, language))
    alone, once = found["rows"]
    for heading, key, form in (
        ("tokens a second", "tokens_per_s", ",.0f"),
        ("memory at the peak, GB", "peak_gb", ".1f"),
    ):
        figure.heading(said(heading, language))
        pairs = ((alone, "each row alone", "theirs"), (once, "computed once", "ours"))
        figure.bars([(said(name, language), row[key], format(row[key], form), style) for row, name, style in pairs])
        figure.y += 8
    return figure.svg()


def intervals_demo(language: str) -> str:
    """Differences of a demo run with their intervals."""
    demo = json.loads(DEMO.read_text(encoding="utf-8"))
    source = said("Source: results.json of `phinetune demo`, 80 held-out messages; {machine}, {date}", language)
    for key in ("machine", "date"):
        source = source.replace(f"{{{key}}}", demo[key])
    figure = Figure(said("Tuned minus base in points, with the 95% interval", language), source)
    left, right = 230.0, WIDTH - 110.0
    scale = (right - left) / 120

    def place(value: float) -> float:
        return left + (value + 20) * scale

    top = figure.y
    for row in demo["rows"]:
        y = figure.y + 14
        figure.text(left - 14, y + 5, row["key"], "ink", "end")
        figure.stroke(place(row["low"]), y, place(row["high"]), y, "trace", 3)
        figure.marks.append(f'<circle cx="{place(row["change"]):.1f}" cy="{y:g}" r="5" class="ours"/>')
        figure.text(right + 14, y + 5, f"{row['change']:+.1f}", "soft")
        figure.y += 28
    for value in (-20, 0, 20, 40, 60, 80, 100):
        figure.text(place(value), figure.y + 20, f"{value:+d}" if value else "0", "soft", "middle")
    figure.stroke(place(0), top, place(0), figure.y + 4)
    figure.y += 30
    return figure.svg()


def intervals_rows(language: str) -> str:
    """How wide the interval of a share of right answers is at worst, by the number of held-out rows."""
    title = "A share of right answers: ± points at worst, by held-out rows"
    figure = Figure(said(title, language), said("Formula: 1.96 · √(0.25 / rows), in evaluation/trust.py", language))
    left, right, top, bottom = 80.0, WIDTH - 40.0, 70.0, 290.0
    counts = (10, 20, 30, 50, 100, 200, 500, 1000)

    def point(rows: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(rows / 10) / math.log(100)
        return x, bottom - (bottom - top) * half_width(rows) / 35

    for points in (0, 10, 20, 30):
        y = bottom - (bottom - top) * points / 35
        figure.stroke(left, y, right, y)
        figure.text(left - 10, y + 5, f"±{points}" if points else "0", "soft", "end")
    figure.path([point(10 * 100 ** (i / 60)) for i in range(61)])
    for rows in counts:
        x, y = point(rows)
        figure.marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="ours"/>')
        figure.text(x + 2, y - 10, f"{half_width(rows):.0f}", "ink", "middle")
        figure.text(x, bottom + 22, f"{rows:,}", "soft", "middle")
    figure.y = bottom + 36
    return figure.svg()


def half_width(rows: float) -> float:
    """Points up or down at worst of a share measured on so many rows, for 95%."""
    return 100 * 1.96 * math.sqrt(0.25 / rows)


FIGURES: dict[str, Callable[[str], str]] = {
    "engine-speed": engine_speed,
    "engine-memory": engine_memory,
    "shared-layout": shared_layout,
    "shared-gain": shared_gain,
    "intervals-demo": intervals_demo,
    "intervals-rows": intervals_rows,
}


def files() -> dict[Path, str]:
    """Each figure's file and what belongs into it: `name.svg`, and `name.zh.svg` with Chinese words."""
    return {
        FOLDER / f"{name}{'' if language == 'en' else '.zh'}.svg": draw(language)
        for name, draw in FIGURES.items()
        for language in LANGUAGES
    }
