"""What exported files lose, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from phinetune.exporting.measuring.losses import Measured
from phinetune.screen.console import say


class MeasuringProgress:
    """A bar for a file that is being measured, on a terminal."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(f"running {name}", total=total)

    def __enter__(self) -> MeasuringProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)


def show_measured(measured: Sequence[Measured], console: Console) -> None:
    """A table with a line for the run and each file, and a sentence a file."""
    table = Table("", "held-out loss", "the same answers", "tokens up to the first difference")
    for one in measured:
        agreed = one.agreement
        cells = [f"{agreed.same} of {agreed.answers}", f"{agreed.tokens:.1%}"] if agreed else ["", ""]
        table.add_row(one.name, "" if one.loss is None else f"{one.loss:.4f}", *cells)
    console.print(table)
    say(console, sentences(measured))


def sentences(measured: Sequence[Measured]) -> list[str]:
    """What each file costs against the run, which comes first."""
    own = measured[0].loss
    return [
        f"{one.name} {_cost(one.loss - own)} here" for one in measured[1:] if one.loss is not None and own is not None
    ]


def _cost(nats: float) -> str:
    if abs(nats) < 0.0005:
        return "costs nothing that shows in three digits"
    return f"costs {nats:.3f} nats" if nats > 0 else f"has {-nats:.3f} nats less"
