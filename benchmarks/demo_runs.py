"""The command line of benchmarks that train on the demo's data: their runs, a table, and the results."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.store import Book, Row


def main(what: str, book: Book, part: str, measured: Callable[[Path, int, list[str], Console], list[Row]]) -> None:
    """Run all, print the table and write the results.

    Args:
        what: the benchmark in a sentence.
        part: the name of the table.
        measured: gives its rows; called with the folder of the runs, the number of prompts, and settings for all runs.
    """
    cli = argparse.ArgumentParser(description=what)
    cli.add_argument("--folder", type=Path, help="where the runs go; a temporary folder if left out")
    cli.add_argument("--prompts", type=int, default=80)
    cli.add_argument("--set", action="append", default=[], dest="settings")
    given = cli.parse_args()
    folder, console = given.folder or Path(tempfile.mkdtemp()), Console()
    rows = measured(folder, given.prompts, given.settings, console)
    console.print(book.table(part, rows))
    if given.settings:
        console.print("A try with other settings: nothing was written")
    else:
        written = book.keep({part: {"machine": machine("auto"), "rows": rows}})
        console.print(f"Wrote {' and '.join(map(str, written))}")
    if not given.folder:
        shutil.rmtree(folder)
