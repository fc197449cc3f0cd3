"""The columns of a file, what they may stand for, and rows read that way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from phinetune.screen.console import Console, say
from phinetune.terminal_text import printable

LONGEST = 60  # letters of an example
SHOWN = 300  # letters of a turn


def show_columns(file: str, rows: int, columns: Iterable[tuple[str, int, str]], console: Console) -> None:
    """A line for each column: its name, in how many of the rows it is filled, and an example."""
    table = Table("column", "filled", "an example", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, filled, example in columns:
        table.add_row(printable(name), f"{filled:,} of {rows:,}", _short(printable(example), LONGEST))
    say(console, f"{file}: the first {rows:,} rows")
    console.print(table)


def show_turns(where: str, turns: Sequence[Mapping[str, str]], problem: str | None, console: Console) -> None:
    """A row turn by turn, or why it can't be read."""
    if problem:
        say(console, f"{where} · can't be read: {printable(problem)}")
        return
    say(console, where)
    for turn in turns:
        say(console, f"{turn['role'] or 'text':>10} │ {_short(printable(turn['content']), SHOWN)}")


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
