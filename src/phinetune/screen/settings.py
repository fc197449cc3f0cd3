"""The settings that phinetune chose, each with its reason, and given ones that are far from their rules."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from phinetune.screen.console import say
from phinetune.training.auto_settings import Choice


def show_settings(choices: Sequence[Choice], console: Console) -> None:
    """A line for each setting that was left open, then a line for each given one that may surprise."""
    chosen = [choice for choice in choices if not choice.given]
    if chosen:
        say(console, "Settings that phinetune chose; a value of your own replaces any of them:")
        table = Table()
        for heading in ("setting", "value", "why"):
            table.add_column(heading, overflow="fold")
        for choice in chosen:
            table.add_row(choice.key.partition(".")[2], shown(choice), choice.why)
        console.print(table)
    for choice in choices:
        if choice.given:
            say(console, f"Look: {choice.key}: {shown(choice)}: {choice.why}", style="yellow")


def shown(choice: Choice) -> str:
    """A value as YAML has it."""
    return str(choice.value).lower() if isinstance(choice.value, bool) else f"{choice.value}"
