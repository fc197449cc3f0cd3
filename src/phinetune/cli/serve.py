"""`phinetune serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from phinetune.screen.console import say, stdout

if TYPE_CHECKING:
    from phinetune.serving.state import ServerState

app = typer.Typer()
KEY_VARIABLE = "PHINETUNE_SERVE_KEY"


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Option("--model", metavar="NAME=PATH", help="a base model on offer; repeatable (starter=starter)"),
    ] = [],  # noqa: B006 (typer copies it)
    host: Annotated[
        str, typer.Option(help="address to listen on; another than the loopback's needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8686,
    folder: Annotated[
        Optional[Path],  # noqa: UP045 (typer reads it at run time)
        typer.Option(help="where files, jobs and runs lie (PHINETUNE_HOME/server)"),
    ] = None,
    key_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help=f"file with the key that clients have to know; or {KEY_VARIABLE}; else one is made"),
    ] = None,
    allow_host: Annotated[
        list[str], typer.Option(metavar="NAME", help="a name by which clients may call this server; repeatable")
    ] = [],  # noqa: B006
    at_once: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="jobs trained at the same time, as memory allows (one for each two cores)"),
    ] = None,
    log_contents: Annotated[bool, typer.Option("--log-contents", help="let the log hold what chats say")] = False,
) -> None:
    """Offer OpenAI's API of files, fine-tuning jobs, models and answers on this machine."""
    from phinetune.logs import set_up_logging
    from phinetune.serving.needs import check_installed
    from phinetune.serving.settings import make_settings

    check_installed()
    settings = make_settings(models, host, port, folder, allow_host, at_once, log_contents)
    from phinetune.serving.server import serve as run

    set_up_logging()
    run(settings, _key(key_file), _ready)


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    return file.read_text(encoding="utf-8").strip()


def _ready(state: ServerState, url: str) -> None:
    """The URL, the key, and the two lines that a client needs."""
    settings = state.settings
    lines = [
        f"Serving {', '.join(settings.models)} at {url} ({settings.folder})",
        "In the shell of a client that speaks OpenAI's API:",
        f"  export OPENAI_BASE_URL={url}/v1",
        f"  export OPENAI_API_KEY={state.key}",
        "Ctrl-C stops the server; jobs that train go on, and the next start finds them.",
    ]
    say(stdout(), lines)
