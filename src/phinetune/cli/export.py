"""`phinetune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.cli.options import RunPath
from phinetune.cli.program import program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def export(
    run: RunPath,
    to: Annotated[str, typer.Option(help="gguf, gguf-lora (the adapter alone), ollama or onnx")],
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--type",
            help="of the numbers: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0, several with commas; "
            "for onnx int4 or f32; what suits the target if left out",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="the file (ollama, onnx: the folder) to write; named after the run if left out"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="run what was written on held-out chats: loss and answers beside the run's own"),
    ] = False,
) -> None:
    """Write a run or a model for another program: llama.cpp, Ollama, onnxruntime-genai."""
    with libraries():
        from phinetune.api.export import export_types

    kinds = [one.strip() for one in kind.split(",")] if kind else [None]
    done, _ = export_types(run, to, kinds, out=out, overwrite=overwrite, measure=measure, console=stdout())
    for one in done:
        say(stdout(), one.report(program()))
