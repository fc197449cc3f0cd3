"""What a merge did to the held-out loss, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from phinetune.engine.scoring import Score


def show_losses(scores: Mapping[str, Score], console: Console) -> None:
    """A column for base, adapter and merged model."""
    one = next(iter(scores.values()))
    table = Table(title=f"Held-out chats ({one.tokens:,} labelled tokens)", title_justify="left")
    for column in ("", *scores):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("loss", *(f"{one.loss:.4f}" for one in scores.values()))
    table.add_row("perplexity", *(f"{one.perplexity:.3f}" for one in scores.values()))
    table.add_row("token accuracy %", *(f"{100 * one.token_accuracy:.2f}" for one in scores.values()))
    console.print(table)
