"""`phinetune combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.cli.program import program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def combine(
    parts: Annotated[
        list[str], typer.Argument(metavar="RUN=WEIGHT…", help="adapters of one base, each with its weight: runs/a=0.7")
    ],
    out: Annotated[Path, typer.Option(help="the folder to write: an adapter, as PEFT reads it")],
    method: Annotated[
        str,
        typer.Option(
            help="PEFT's combination_type: cat (the exact sum; ranks add up), svd, linear, ties, ties_svd, "
            "dare_linear, dare_ties or magnitude_prune"
        ),
    ] = "cat",
    rank: Annotated[Optional[int], typer.Option(min=1, help="with svd: the rank of the result")] = None,  # noqa: UP045
    density: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="with ties, dare and magnitude_prune: the share of the numbers that are kept"),
    ] = None,
) -> None:
    """Make one adapter of several of the same base, each with a weight."""
    with libraries():
        from phinetune.exporting.combine import combine as combine_adapters
        from phinetune.exporting.combine import parse_parts

    done = combine_adapters(parse_parts(parts), out, method=method, rank=rank, density=density)
    lines = [
        *done.report(),
        "Next:",
        f"  {program()} evaluate {done.path} --data FILE",
        f"  {program()} chat {done.path}",
    ]
    say(stdout(), lines)
