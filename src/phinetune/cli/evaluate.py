"""`phinetune evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from phinetune.cli.options import Device, RunPath
from phinetune.cli.program import program
from phinetune.errors import PhinetuneError
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

app = typer.Typer()


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[
        list[str], typer.Option("--data", help="held-out chats; the run's own held-out chats if left out")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="write the results as JSON, every answer included")] = None,
    max_prompts: Annotated[Optional[int], typer.Option(min=1, help="answer the first N prompts only")] = None,  # noqa: UP045
    max_new_tokens: Annotated[Optional[int], typer.Option(min=1, help="tokens an answer may have")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="prompts answered together")] = None,  # noqa: UP045
    metrics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='as evaluation.metrics, e.g. "[exact_match, {name: polite, function: polite.py:score}]"'),
    ] = None,
    tag: Annotated[Optional[str], typer.Option(help="column of the data by whose values to split as well")] = None,  # noqa: UP045
    generate: Annotated[bool, typer.Option(help="let the models answer, or score the chats only")] = True,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="run these tasks of lm-evaluation-harness in place of held-out chats"),
    ] = None,
    include_path: Annotated[Optional[Path], typer.Option(help="a folder of task files of your own")] = None,  # noqa: UP045
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="with --tasks: prompts go into the checkpoint's chat template")
    ] = False,
    device: Device = "auto",
) -> None:
    """Compare a run with its base on held-out chats, or on tasks; a model without an adapter is measured alone."""
    if tasks:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _refuse_beside_tasks(data=data, metrics=metrics, tag=tag)
        _evaluate_tasks(run, names, include_path, max_prompts, batch_size, chat_template, device, out)
        return
    with libraries():
        from phinetune.api.evaluate import evaluate as evaluate_run

    given: dict[str, Any] = {
        "max_prompts": max_prompts,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "metrics": _read_metrics(metrics),
    }
    section = {"generate": generate, **{key: value for key, value in given.items() if value is not None}}
    console = stdout()
    evaluate_run(run, data or None, section, tag=tag, out=out, console=console, device=device)
    say(console, f"Next: {program()} chat {run}")


def _refuse_beside_tasks(**given: Any) -> None:
    """Held-out chats and tasks are two evaluations."""
    problems = [f"--{name} and --tasks are two evaluations; give one of them" for name, one in given.items() if one]
    if problems:
        raise PhinetuneError(problems)


def _read_metrics(text: str | None) -> Any:
    import yaml

    from phinetune.config.yaml_text import read_yaml

    try:
        return read_yaml(text, f"--metrics {text}", lines=False) if text else None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise PhinetuneError(f"--metrics {text}: write it as YAML, e.g. [exact_match, bleu] ({problem})") from None


def _evaluate_tasks(
    run: str,
    tasks: list[str],
    include_path: Path | None,
    limit: int | None,
    batch_size: int | None,
    chat_template: bool,
    device: str,
    out: Path | None,
) -> None:
    with libraries():
        from phinetune.api.evaluate import evaluate_tasks

    evaluate_tasks(
        run,
        tasks,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        chat_template=chat_template,
        out=out,
        console=stdout(),
        device=device,
    )
    say(stdout(), f"Next: {program()} evaluate {run} --data FILE")
