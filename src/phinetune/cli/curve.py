"""`phinetune curve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.cli.options import SetOption
from phinetune.cli.program import again, program
from phinetune.cli.train import STOPPED
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def curve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="the folder of the curve; output_dir with -curve behind it if left out"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin the curve that is there anew")] = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Train on an eighth, a quarter, half and all of the rows, and say what doubling them is likely to give."""
    with libraries():
        from phinetune.api.curve import PAGE, curve_config
        from phinetune.config.run import load_config

    made = curve_config(load_config(config, overrides), stdout(), out=out, overwrite=overwrite)
    if made.stopped:
        command = f"{program()} curve {config}{again({'--out': out}, overrides)}"
        say(stdout(), [f"Stopped; what is finished stays in {made.path}. Go on with:", f"  {command}"])
        sys.exit(STOPPED)
    lines = [
        f"\nWrote {made.path}: a run for each share, curve.json and the page {made.path / PAGE}",
        f"Next: {program()} chat {made.path / 'all'}",
    ]
    say(stdout(), lines)
