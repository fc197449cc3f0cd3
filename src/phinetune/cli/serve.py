"""`phinetune serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.cli.options import Weights
from phinetune.screen.console import say, stdout

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
    backend: Annotated[
        str, typer.Option(help="what answers: phinetune, or llama.cpp with each model as GGUF")
    ] = "phinetune",
    gguf_type: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="type of these GGUF files, as `export --type` (q8_0)"),
    ] = None,
    weights: Weights = "auto",
    log_contents: Annotated[bool, typer.Option("--log-contents", help="let the log hold what chats say")] = False,
) -> None:
    """Offer OpenAI's API of files, fine-tuning jobs, models and answers on this machine."""
    from phinetune.serving.own_threads import end_process
    from phinetune.serving.serve import serve as run

    run(
        models,
        host=host,
        port=port,
        folder=folder,
        key=_key(key_file),
        allow_host=allow_host,
        at_once=at_once,
        backend=backend,
        gguf_type=gguf_type,
        weights=weights,
        log_contents=log_contents,
        on_ready=_ready,
    )
    end_process()


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    return file.read_text(encoding="utf-8").strip()


def _ready(url: str, key: str, where: str) -> None:
    """The URL, the key, and the two lines that a client needs."""
    lines = [
        f"Serving {where} at {url}",
        f"The page, signed in: {url}/#key={key}",
        "In the shell of a client that speaks OpenAI's API:",
        f"  export OPENAI_BASE_URL={url}/v1",
        f"  export OPENAI_API_KEY={key}",
        "Ctrl-C stops the server; jobs that train go on, and the next start finds them.",
    ]
    say(stdout(), lines)
