"""What the curves of a run say, under its table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from phinetune.screen.console import say


def show_curves(words: Sequence[Mapping[str, str]], console: Console) -> None:
    """A line for each thing that the curves say; yellow where something is to be done."""
    for one in words:
        say(console, f"Curves: {one['text']}", style=None if one["kind"] == "sound" else "yellow")
