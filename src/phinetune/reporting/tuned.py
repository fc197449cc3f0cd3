"""The picture of a race: learning rates against held-out losses, a line for each look at the candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 150, 14, 40
ROOM = 0.08  # of the range, on each side
TICKS = 4


@dataclass(frozen=True)
class Mark:
    """A candidate at a look, in the picture's units; the title is what a pointer shows."""

    x: float
    y: float
    title: str
    won: bool


@dataclass(frozen=True)
class Look:
    """A line through the candidates at one number of steps; `strength` from 0 (the first look) to 1 (the last)."""

    name: str
    path: str
    marks: Sequence[Mark]
    strength: float


@dataclass(frozen=True)
class Picture:
    """All that the page draws: axes as (place, text), and a line for each look."""

    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    looks: Sequence[Look]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def picture(tree: Mapping[str, Any]) -> Picture | None:
    """The picture of the learning rates; None if fewer than two candidates have a loss.

    Args:
        tree: what tune.json holds.
    """
    stage = next((one for one in tree.get("stages") or [] if one["key"] == "learning_rate"), None)
    if stage is None:
        return None
    found = [one for one in tree["candidates"] if stage["first"] <= one["number"] < stage["end"]]
    points = [
        (int(steps), float(one["values"]["learning_rate"]), loss, one["number"])
        for one in found
        for steps, loss in one["losses"].items()
        if loss is not None and int(steps) in {rung["steps"] for rung in stage["rungs"]}
    ]
    if len({rate for _, rate, _, _ in points}) < 2:
        return None
    across = _scale([math.log(rate) for _, rate, _, _ in points], LEFT, WIDTH - RIGHT)
    down = _scale([-loss for _, _, loss, _ in points], TOP, HEIGHT - BOTTOM)
    steps = sorted({step for step, *_ in points})
    looks = []
    for order, step in enumerate(steps):
        here = sorted((rate, loss, number) for at, rate, loss, number in points if at == step)
        marks = [
            Mark(
                across(math.log(rate)),
                down(-loss),
                f"{rate:g}: {loss:.4f} after {step} steps",
                number == stage["winner"],
            )
            for rate, loss, number in here
        ]
        path = " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in marks)
        looks.append(Look(f"{step:,} steps", path, marks, (order + 1) / len(steps)))
    rates = sorted({rate for _, rate, _, _ in points})
    losses = [loss for _, _, loss, _ in points]
    low, high = min(losses), max(losses)
    levels = sorted({low + (high - low) * place / (TICKS - 1) for place in range(TICKS)})
    return Picture(
        [(across(math.log(rate)), f"{rate:.3g}") for rate in _apart(rates)],
        [(down(-level), f"{level:.3g}") for level in levels],
        looks,
    )


def headline(tree: Mapping[str, Any]) -> str:
    """What the race found, as far as it has come."""
    candidates = tree.get("candidates") or []
    done = [stage for stage in tree.get("stages") or [] if stage["winner"] is not None]
    if not done:
        return f"{len(candidates)} candidates, none of them chosen yet"
    values = candidates[done[-1]["winner"]]["values"]
    return (
        ", ".join(f"{key} {value:g}" for key, value in values.items()) + f": the best of {len(candidates)} candidates"
    )


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    """Maps the range of the values, with some room, onto a range of the picture."""
    low, high = min(values), max(values)
    room = ROOM * (high - low) or 1.0
    low, high = low - room, high + room
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def _apart(rates: Sequence[float], most: int = 6) -> Sequence[float]:
    """So many of the rates that their names have room."""
    every = math.ceil(len(rates) / most)
    return rates[::every]


def table(tree: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings and rows of all candidates: values, losses by steps, and what became of each."""
    found = [one for one in tree.get("candidates") or [] if one["losses"]]
    keys = list(dict.fromkeys(key for one in found for key in one["values"]))
    steps = sorted({int(step) for one in found for step in one["losses"]})
    winners = [stage["winner"] for stage in tree.get("stages") or []]
    rows = []
    for one in found:
        losses = ["" if str(step) not in one["losses"] else _loss(one["losses"][str(step)]) for step in steps]
        values = [f"{one['values'][key]:g}" if key in one["values"] else "" for key in keys]
        fate = "best" if winners and one["number"] == winners[-1] else "out" if one["state"] == "dropped" else ""
        rows.append((f"candidate {one['number']}", [*values, *losses, fate]))
    return [*keys, *(f"step {step:,}" for step in steps), ""], rows


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


OPTIMISM = (
    "Rows that chose between candidates make the chosen one look slightly better than it is. Chats kept for the "
    "verdict alone (data.test) don't."
)
