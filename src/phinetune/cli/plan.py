"""`phinetune plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from phinetune.cli.options import SetOption
from phinetune.cli.program import again, program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")],
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
    probe: Annotated[bool, typer.Option(help="measure a layer of the model on this machine, for the time")] = True,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Say what a run will take of memory, time and disk. Status 1: it does not fit; what would is listed."""
    with libraries():
        from phinetune.api.plan import plan_config
        from phinetune.config.run import load_config
        from phinetune.screen.plan import show_plan

    made = plan_config(load_config(config, overrides), probe=probe)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        show_plan(made, stdout())
        if made.refused:
            say(stdout(), f"`train` refuses it as the folder is now: {made.refused}")
        elif made.fits:
            say(stdout(), f"Next: {program()} train {config}{again({}, overrides)}")
    if not made.fits:
        sys.exit(1)
