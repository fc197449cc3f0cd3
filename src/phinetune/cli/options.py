"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="a run, an adapter folder or a model (hub id or folder)")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. training_config.max_steps=5; repeatable"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run in output_dir")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
NewTokens = Annotated[int, typer.Option(min=1, help="tokens an answer may have")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher is more varied")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="sample from the likeliest tokens of this total probability")
]
TopK = Annotated[int, typer.Option(min=0, help="sample from this many likeliest tokens; 0 is all")]
Weights = Annotated[
    str, typer.Option(help="how the base lies in memory: auto, or q8_0: eight bits as llama.cpp's, answers come faster")
]
Seed = Annotated[Optional[int], typer.Option(help="seed of the sampling")]  # noqa: UP045 (typer reads it at run time)
System = Annotated[Optional[str], typer.Option(help="a system message")]  # noqa: UP045
