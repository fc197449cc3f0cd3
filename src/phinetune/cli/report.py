"""`phinetune report` and `phinetune watch`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.errors import PhinetuneError
from phinetune.program import console, program

app = typer.Typer()
COMPARISON = "comparison.html"


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="a run, or several to compare")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help=f"the file to write; report.html in the run, for several runs {COMPARISON} here"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
) -> None:
    """Write the page of a run, or one that compares several: a single HTML file that loads nothing."""
    from phinetune.report.page import write_comparison, write_report

    target = out or (Path(COMPARISON) if len(runs) > 1 else None)
    if target and target.is_dir():
        raise PhinetuneError(f"{target} is a folder; give --out the name of a file")
    if target and target.exists() and not overwrite:
        raise PhinetuneError(f"{target} is there already; name another file with --out, or replace it with --overwrite")
    made = write_comparison(runs, target) if target and len(runs) > 1 else write_report(runs[0], target)
    after = f"{program()} watch {runs[0]}" if len(runs) == 1 else f"{program()} report {runs[0]}"
    lines = [f"Wrote {made} (one file; open it in any browser: {made.resolve().as_uri()})", f"Next: {after}"]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, while it trains or afterwards")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="of 127.0.0.1; 0 is any that is free")] = 8420,
) -> None:
    """Serve the page of a run on this machine, renewed as it trains, until Ctrl-C."""
    from phinetune.report.watch import watch as serve

    screen = console()
    serve(run, port, lambda line: screen.print(line, markup=False, highlight=False, soft_wrap=True))
