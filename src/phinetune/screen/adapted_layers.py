"""The layers that an adapter sits on, as a table."""

from __future__ import annotations

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from phinetune.checkpoints.target_modules import matched_targets


def show_targets(model: PeftModel, console: Console) -> None:
    """A table of the layers that the adapter sits on."""
    console.print("LoRA sits on:", highlight=False)
    table = Table()
    for column in ("layers", "count", "shape (out × in)", "rank", "parameters"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for target in matched_targets(model):
        shape = f"{target.out_features} × {target.in_features}"
        table.add_row(target.name, str(target.count), shape, str(target.rank), f"{target.parameters:,}")
    console.print(table)
