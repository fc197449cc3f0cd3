"""Whatever is printed, in whatever way, shows a stranger's text as text."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from phinetune.screen.console import Screen, say
from test_terminal_text import ATTACKS

WAYS: dict[str, Callable[[Screen, str], Any]] = {
    "a line": lambda console, text: console.print(text, soft_wrap=True),
    "a said line": lambda console, text: say(console, text),
    "a styled line": lambda console, text: console.print(text, style="bold"),
    "a Text": lambda console, text: console.print(Text(text, style="red")),
    "a cell": lambda console, text: console.print(_table(text)),
    "a heading": lambda console, text: console.print(Table(text, title=text)),
    "a panel": lambda console, text: console.print(Panel(text, title=text)),
    "two at a time": lambda console, text: console.print("a", text, sep=" "),
    "a bar": lambda console, text: _bar(console, text),
    "a log": lambda console, text: console.log(text),
}


def _table(text: str) -> Table:
    table = Table("name", caption=text)
    table.add_row(text)
    return table


def _bar(console: Screen, text: str) -> None:
    with Progress(TextColumn("{task.fields[name]}"), console=console) as progress:
        progress.add_task("x", name=text)


def printed(show: Callable[[Screen, str], Any], text: str) -> str:
    console = Screen(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
    show(console, text)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("show", [pytest.param(show, id=name) for name, show in WAYS.items()])
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in ATTACKS.items()])
def test_no_escape_gets_through(show: Callable[[Screen, str], Any], text: str) -> None:
    shown = printed(show, text)
    assert shown.replace("\n", "").isprintable(), repr(shown)


@pytest.mark.parametrize("text", ["[/x]", "[link=http://evil.example]x[/link]", "[red]", ":smile:", "[bold]a[/bold]"])
def test_markup_in_text_is_text(text: str) -> None:
    for name, show in WAYS.items():
        if name not in ("a bar", "a panel"):  # not used, and rich reads their parts by itself
            assert text in printed(show, text), name


def test_tabs_and_line_breaks_lay_text_out() -> None:
    assert printed(WAYS["a line"], "a\n\tb").startswith("a\n")
    assert "␉" not in printed(WAYS["a line"], "a\n\tb")


def test_colours_of_its_own_stay() -> None:
    console = Screen(file=io.StringIO(), width=40, force_terminal=True, color_system="standard")
    console.print(Text("ok", style="red"))
    assert console.file.getvalue() == "\x1b[31mok\x1b[0m\n"  # type: ignore[attr-defined]
