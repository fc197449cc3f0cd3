"""`phinetune train` and `phinetune demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phinetune.cli.options import Overwrite, SetOption
from phinetune.cli.program import program
from phinetune.screen.console import say, stdout

if TYPE_CHECKING:
    from phinetune.api.train import Run
    from phinetune.config.run import RunConfig

app = typer.Typer()


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="the run's YAML file (`phinetune config` explains it)")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in output_dir")] = False,
    overwrite: Overwrite = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Fine-tune by a YAML file, then compare base and tuned model on the held-out chats."""
    from phinetune.config.run import load_config

    made = _train(load_config(config, overrides), f"{program()} train {config}", resume, overwrite)
    _say_next(made.path)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped demo")] = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Fine-tune the starter model on the bundled chats of an outdoor-gear shop: minutes on a CPU."""
    from phinetune.demo_data.demo_config import demo_config
    from phinetune.screen.demo_gain import show_gain

    config = demo_config(output_dir, overrides)
    made = _train(config, f"{program()} demo --output-dir {output_dir}", resume, overwrite)
    show_gain(made.results, stdout())
    _say_next(made.path)


def _train(config: RunConfig, command: str, resume: bool, overwrite: bool) -> Run:
    from phinetune.api.train import train_config

    console = stdout()
    made = train_config(config, console, resume=resume, overwrite=overwrite)
    if made.stopped:
        steps = made.results["training"]["steps"]
        say(
            console,
            f"Stopped after step {steps}; a checkpoint is in {made.path}, a report in {made.path / 'report.html'}. "
            f"Go on with:\n  {command} --resume",
        )
        sys.exit(130)
    return made


def _say_next(path: Path) -> None:
    page = path / "report.html"
    lines = [
        f"\nWrote {path}: the adapter, its tokenizer, checkpoints, results.json and a model card (README.md)",
        *([f"See how it went: {page}"] if page.is_file() else []),
        "Next:",
        f"  {program()} chat {path}",
        f'  {program()} generate {path} --prompt "…"',
        f"  {program()} evaluate {path} --data FILE",
    ]
    say(stdout(), lines)
