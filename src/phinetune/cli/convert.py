"""`phinetune convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def convert(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="an adapter folder of PEFT or mlx-lm, or a loralib checkpoint (.pt)")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="what to write: a folder (PEFT) or a .pt file (loralib)")],
    to: Annotated[
        str,
        typer.Option(
            help="peft or loralib; from a PEFT folder also peft-split (q_proj, k_proj, v_proj, gate_proj, up_proj, as "
            "vLLM takes) or peft-fused (qkv_proj, gate_up_proj)"
        ),
    ],
    lora_alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="from loralib: the layers' lora_alpha; to loralib: theirs, if it is not to be the adapter's"),
    ] = None,
    merged: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=ROWS,ROWS,…",
            help="a fused layer (MergedLinear) and its splits' rows, e.g. qkv_proj=3072,-3072,3072; "
            "-ROWS is a split without an adapter; repeatable",
        ),
    ] = [],  # noqa: B006
    base: Annotated[Optional[str], typer.Option(help="to PEFT: the base model to record")] = None,  # noqa: UP045
    embedding: Annotated[
        list[str], typer.Option(metavar="NAME", help="from loralib: a layer that is an embedding; repeatable")
    ] = [],  # noqa: B006
    linear: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="from loralib: a layer that is linear, whatever it looks like; repeatable"),
    ] = [],  # noqa: B006
) -> None:
    """Convert an adapter between PEFT's forms and loralib's, and check the update of every layer."""
    with libraries():
        from phinetune.exporting.convert.convert import convert as convert_adapter

    done = convert_adapter(
        src, dst, to, lora_alpha=lora_alpha, base=base, merged=merged, embedding=embedding, linear=linear
    )
    say(stdout(), done.report())
