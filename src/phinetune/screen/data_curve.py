"""A data curve on the terminal: the runs, what doubling the rows is likely to give, and what is learnt worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from phinetune.durations import spell_seconds
from phinetune.metric_table import LOSS
from phinetune.screen.console import say
from phinetune.screen.hard_rows import show_hard_rows


def show_data_curve(tree: Mapping[str, Any], console: Console) -> None:
    """The curve as a table and in sentences. `tree`: as curve.json holds it."""
    table = Table()
    for name in ("rows", "steps", "held-out loss", f"{tree['level']}% interval", "gain", "time"):
        table.add_column(name, justify="right")
    table.add_row("0 (base)", "", LOSS.amount(tree["base"]), "", "", "")
    before = tree["base"]
    for point in tree["points"]:
        gain = LOSS.amount(before - point["loss"], sign=True)
        ends = f"{LOSS.amount(point['low'])} to {LOSS.amount(point['high'])}"
        seconds = spell_seconds(point["seconds"])
        table.add_row(f"{point['rows']:,}", f"{point['steps']:,}", LOSS.amount(point["loss"]), ends, gain, seconds)
        before = point["loss"]
    then = tree["forecast"]
    ends = f"{LOSS.amount(before - then['high'])} to {LOSS.amount(before - then['low'])}"
    gain = f"{LOSS.amount(then['low'], sign=True)} to {LOSS.amount(then['high'], sign=True)}"
    table.add_row(f"{then['rows']:,}", "", f"{LOSS.amount(then['loss'])}?", ends, gain, "", style="cyan")
    console.print(table)
    say(console, then["text"])
    if tree["check"]:
        say(console, tree["check"]["text"], style=None if tree["check"]["inside"] else "yellow")
    for flag in tree["flags"]:
        say(console, f"{flag}.", style="yellow")
    show_hard_rows(tree["hard"], console)
