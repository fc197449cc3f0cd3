"""`phinetune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.cli.options import Device
from phinetune.cli.program import program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, one of its checkpoints or an adapter folder")],
    out: Annotated[Path, typer.Option(help="the folder to write: a transformers model without PEFT")],
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32, bfloat16 or float16; the dtype of the base's files if left out"),
    ] = None,
    base: Annotated[
        str,
        typer.Option(help="for a run with model.quantization: 16bit, or quantized, the weights it was trained on"),
    ] = "16bit",
    score: Annotated[
        bool, typer.Option(help="measure base, adapter and merged model on the run's held-out chats")
    ] = True,
    device: Device = "auto",
) -> None:
    """Merge a run into its base: a model that runs without PEFT, written shard by shard."""
    with libraries():
        from phinetune.api.merge import merge as merge_run

    console = stdout()
    made = merge_run(run, out, dtype=dtype, base=base, score=score, console=console, device=device)
    lines = ["Next:", f"  {program()} chat {made.path}", f"  {program()} evaluate {made.path} --data FILE"]
    say(console, lines)
