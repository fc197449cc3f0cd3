"""The candidates of a race: a table, and a bar for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from phinetune.screen.console import say

BAR = 24  # cells of the longest bar


def show_race(tree: Mapping[str, Any], console: Console) -> None:
    """A row for each candidate: its values, its losses by steps, and what became of it.

    Args:
        tree: what tune.json holds.
    """
    found: Sequence[Mapping[str, Any]] = [one for one in tree["candidates"] if one["losses"]]
    if not found:
        return
    keys = list(dict.fromkeys(key for one in found for key in one["values"]))
    looks = sorted({int(step) for one in found for step in one["losses"]})
    table = Table(title=f"Candidates, and their losses on {tree['rows']} held-out rows", title_justify="left")
    for heading in ("", *keys, *(f"step {look:,}" for look in looks), "last loss", ""):
        table.add_column(heading, justify="right" if heading else "left")
    shown = [loss for one in found if (loss := last_loss(one)) is not None]
    for one in sorted(found, key=lambda one: float(one["values"].get("learning_rate") or 0)):
        losses = [_number(one["losses"].get(str(look))) if str(look) in one["losses"] else "" for look in looks]
        values = [f"{one['values'][key]:g}" if key in one["values"] else "" for key in keys]
        table.add_row(str(one["number"]), *values, *losses, _bar(last_loss(one), shown), _fate(one, tree))
    console.print(table)
    for line in tree["why"]:
        say(console, line)


def last_loss(one: Mapping[str, Any]) -> float | None:
    """A candidate's loss at its last look; None if that is no number."""
    found: float | None = one["losses"][max(one["losses"], key=int)]
    return found


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _bar(loss: float | None, losses: Sequence[float]) -> str:
    """A bar from zero; the longest is the largest loss."""
    return "" if loss is None else "━" * max(1, round(BAR * loss / max(*losses, 1e-9)))


def _fate(one: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    decided = [stage["winner"] for stage in tree["stages"] if stage["winner"] is not None]
    if decided and one["number"] == decided[-1]:
        return "best" if len(decided) == len(tree["stages"]) else "best so far"
    return {"dropped": "out", "running": "waits"}.get(one["state"], str(one["state"]))
