"""`phinetune report` and `phinetune watch`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.cli.program import program
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="a run, or several to compare")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="the file to write; report.html in the run, for several runs comparison.html here"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
) -> None:
    """Write the page of a run, or one that compares several: a single HTML file that loads nothing."""
    from phinetune.api.report import report as write

    made = write(runs, out, overwrite=overwrite)
    after = f"{program()} watch {runs[0]}" if len(runs) == 1 else f"{program()} report {runs[0]}"
    lines = [f"Wrote {made} (one file; open it in any browser: {made.resolve().as_uri()})", f"Next: {after}"]
    say(stdout(), lines)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, while it trains or afterwards")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="of 127.0.0.1; 0 is any that is free")] = 8420,
) -> None:
    """Serve the page of a run on this machine, renewed as it trains, until Ctrl-C."""
    from phinetune.api.report import watch as serve

    screen = stdout()
    serve(run, port, lambda line: say(screen, line))
