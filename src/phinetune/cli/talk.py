"""`phinetune generate` and `phinetune chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from phinetune.cli.options import Device, NewTokens, RunPath, Seed, System, Temperature, TopK, TopP, Weights
from phinetune.errors import PhinetuneError
from phinetune.loading import libraries
from phinetune.screen.console import stdout
from phinetune.terminal_text import visible

app = typer.Typer()


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[Optional[str], typer.Option(help="the message; standard input if left out")] = None,  # noqa: UP045
    system: System = None,
    base: Annotated[bool, typer.Option("--base", help="let the base model answer")] = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    weights: Weights = "auto",
    device: Device = "auto",
) -> None:
    """Answer one message: the answer alone goes to standard output."""
    message = prompt if prompt is not None else sys.stdin.read()
    if not message.strip():
        raise PhinetuneError("there is no message: give --prompt, or text on standard input")
    with libraries():
        from phinetune.api.talk import generate as answer_one

    answer = answer_one(
        run,
        message,
        system=system,
        base=base,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        weights=weights,
        device=device,
    )
    # A program gets the answer to the letter; on a terminal nothing in it acts.
    print(visible(answer.text, "\n\t") if sys.stdout.isatty() else answer.text)
    if not answer.stopped:
        print(f"(cut at --max-new-tokens {max_new_tokens})", file=sys.stderr)


@app.command()
def chat(
    run: RunPath,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    weights: Weights = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a run: streamed answers, /reset, /base to hear the base model."""
    with libraries():
        from phinetune.api.talk import chat as open_chat
        from phinetune.screen.chat_loop import hold_chat

    conversation = open_chat(
        run,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        weights=weights,
        device=device,
    )
    hold_chat(conversation, stdout())
