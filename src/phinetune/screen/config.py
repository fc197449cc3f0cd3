"""The keys of a run's YAML file, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show_knobs(knobs: Sequence[tuple[str, str, str]], console: Console) -> None:
    """A line a key: its default, and what it does."""
    table = Table(title="Keys of a run's YAML file", title_justify="left")
    for column in ("key", "default", "what it does"):
        table.add_column(column, overflow="fold")
    for row in knobs:
        table.add_row(*row)
    console.print(table, highlight=False)
