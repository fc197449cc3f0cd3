"""`phinetune config`."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command()
def config() -> None:
    """Show every key of a run's YAML file, with its default and what it does."""
    from phinetune.config.run import describe_config
    from phinetune.screen.config import show_knobs
    from phinetune.screen.console import stdout

    show_knobs(describe_config(), stdout())
