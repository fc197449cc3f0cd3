"""`phinetune push`."""

from __future__ import annotations

from typing import Annotated

import typer

from phinetune.cli.program import program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, one of its checkpoints or an adapter folder")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub; made if it is not there")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="whether only you, or everyone, may see the repository")
    ] = True,
    merged: Annotated[
        bool, typer.Option("--merged", help="push base and adapter merged into one model, not the adapter alone")
    ] = False,
) -> None:
    """Push a run to the Hugging Face hub with a model card; the token is HF_TOKEN's, .env's or `hf auth login`'s."""
    with libraries():
        from phinetune.exporting.hub.push import push as push_run

    done = push_run(run, repo, private=private, merged=merged)
    say(stdout(), done.report(program()))
