"""What a tuned model kept of its base: a small table beside that of what it gained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from phinetune.metric_table import LOSS
from phinetune.screen.console import say


def show_kept(kept: Mapping[str, Any] | None, console: Console) -> None:
    """The neutral chats as a table by what they ask for, and in a sentence. `kept`: as results.json holds it."""
    if not kept:
        return
    asked = f", {kept['answers']} answered" if kept["answers"] else ""
    say(console, f"What was kept, on {kept['rows']} neutral chats{asked} (took {kept['share']:.0%} of the evaluation):")
    table = Table()
    table.add_column("")
    for name in ("rows", "loss, base", "loss, tuned"):
        table.add_column(name, justify="right")
    table.add_row("all", str(kept["rows"]), *_losses(kept["results"]))
    for tag, part in kept["by_tag"].items():
        table.add_row(tag, str(part["rows"]), *_losses(part))
    console.print(table)
    say(console, kept["text"])


def _losses(part: Mapping[str, Any]) -> list[str]:
    values = [part[name]["loss"] for name in ("base", "tuned")]
    return ["not finite" if value is None else LOSS.amount(value) for value in values]
