"""Which kinds of rows were learnt worst, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from phinetune.metric_table import LOSS
from phinetune.screen.console import say

KINDS = 5  # that are shown; the report has more


def show_hard_rows(hard: Mapping[str, Any] | None, console: Console) -> None:
    """The kinds as a table, each with its worst row, and in a sentence. `hard`: as results.json holds it."""
    if not hard:
        return
    say(console, hard["text"])
    if not hard["kinds"]:
        return
    kinds = hard["kinds"][:KINDS]
    doubled = "last_doubling" in kinds[0]
    table = Table()
    table.add_column("learnt worst", no_wrap=True)
    for name in ("rows", "base", "tuned", "above others", f"{hard['level']}% interval"):
        table.add_column(name, justify="right")
    if doubled:
        table.add_column("last doubling", justify="right")
    for one in kinds:
        ends = f"{LOSS.amount(one['low'], sign=True)} to {LOSS.amount(one['high'], sign=True)}"
        numbers = [LOSS.amount(one["base"]), LOSS.amount(one["loss"]), LOSS.amount(one["above"], sign=True), ends]
        numbers += [LOSS.amount(-one["last_doubling"], sign=True)] if doubled else []
        table.add_row(f"{one['by']}: {one['name']}", str(one["rows"]), *numbers)
    console.print(table)
    for one in kinds:
        shown = one["examples"][0]
        place = f", {shown['place']}" if shown.get("place") else ""
        say(console, f"  {one['by']}: {one['name']}, for example (loss {shown['loss']:.3g}{place}): {shown['prompt']}")
