"""`phinetune train` and `phinetune demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phinetune import launched
from phinetune.cli.launching import launch, launches
from phinetune.cli.options import Overwrite, SetOption
from phinetune.cli.program import again, program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

if TYPE_CHECKING:
    from phinetune.api.train import Run

app = typer.Typer()
# The exit status of a run that stopped with a checkpoint: EX_TEMPFAIL of sysexits.h, by which schedulers may start it
# again.
STOPPED = 75


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="the run's YAML file (`phinetune config` explains it)")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in output_dir")] = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="with --resume: go on although something has changed, and record it")
    ] = False,
    overwrite: Overwrite = False,
    max_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="stop with a checkpoint before this time is over, as 2h30m")
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="processes on this machine that train together, each with a GPU or a share of the cores",
        ),
    ] = 1,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Fine-tune by a YAML file, then compare base and tuned model on the held-out chats."""
    if launches(nproc):
        sys.exit(launch(nproc, sys.argv[1:]))
    with libraries():
        from phinetune.api.train import train_config
        from phinetune.config.run import load_config

    made = train_config(
        *(load_config(config, overrides), stdout()),
        resume=resume,
        overwrite=overwrite,
        changed=changed,
        max_time=max_time,
    )
    options = again({"--nproc": nproc if nproc > 1 else None}, overrides)
    say_next(made, f"{program()} train {config}{options}")


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped demo")] = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Fine-tune the starter model on the bundled chats of an outdoor-gear shop: minutes on a CPU."""
    with libraries():
        from phinetune.api.train import demo as run_demo

    made = run_demo(output_dir, overrides, resume=resume, overwrite=overwrite, console=stdout())
    say_next(made, f"{program()} demo{again({'--output-dir': output_dir}, overrides)}")


def say_next(made: Run, command: str, more: str = " --resume") -> None:
    """What was written and what to do next. A run that was stopped ends the program with status `STOPPED`.

    Of several processes the first one says it. Its launcher would end it at once if one of the others failed.
    """
    if launched.rank():
        return
    path, page = made.path, made.path / "report.html"
    if made.stopped:
        steps = made.results["training"]["steps"]
        stopped = f"Stopped after step {steps}; a checkpoint is in {path}, a report in {page}. Go on with:"
        say(stdout(), [stopped, f"  {command}{more}"])
        if not launched.is_ours():
            sys.exit(STOPPED)
        launched.report(STOPPED)
        return
    lines = [
        f"\nWrote {path}: the adapter, its tokenizer, checkpoints, results.json and a model card (README.md)",
        *([f"See how it went: {page}"] if page.is_file() else []),
        "Next:",
        f"  {program()} chat {path}",
        f'  {program()} generate {path} --prompt "…"',
        f"  {program()} evaluate {path} --data FILE",
        f"  {program()} export {path} --to ollama",
    ]
    say(stdout(), lines)
