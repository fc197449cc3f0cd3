"""`phinetune data`: look at chats before a run does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from phinetune.errors import DataError, PhinetuneError
from phinetune.program import console, program

if TYPE_CHECKING:
    from phinetune.config.run import RunConfig

app = typer.Typer(help="Look at chats before a run does.", no_args_is_help=True)

Files = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads it at run time)
    typer.Argument(metavar="FILE…", help="files of chats; the configuration's data.train if left out"),
]
ConfigFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--config", metavar="CONFIG", help="a run's YAML file: its checkpoint, lengths and data settings"),
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. model.path=FOLDER; repeatable"),
]


@app.command()
def check(
    files: Files = None,
    config: ConfigFile = None,
    held_out: Annotated[
        list[str], typer.Option("--held-out", metavar="FILE", help="held-out chats; data.eval if left out; repeatable")
    ] = [],  # noqa: B006 (typer copies it)
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    fix: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--fix", metavar="OUT", help="write the cleaned rows of all FILEs to a new .jsonl file"),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Look at every row: what is kept, cut and dropped, and what stands out. Status 1: a run would be spoiled."""
    from phinetune.data.check.check import check_files
    from phinetune.data.check.fix import check_target, write_fixed
    from phinetune.screen.check import show_check

    run = _config(config, overrides)
    chosen = _chosen(files, run)
    others = held_out or [file for file in _held_out(run) if file not in (files or [])]
    _check_sources([*chosen, *others])
    if fix:
        check_target(fix)
    encoder, max_length = _encoder(run)
    with _progress() as on_row:
        report = check_files(chosen, others, run.data, encoder, max_length, on_row)
    fixed, failure = None, None
    try:
        fixed = write_fixed(report, fix) if fix else None
    except DataError as error:  # the report is worth its while all the same
        failure = error
    if as_json:
        tree = {"files": chosen, **report.to_dict(), "fixed": fixed.to_dict() if fixed else None}
        print(json.dumps(tree, indent=2))
    else:
        screen = console()
        show_check(report, screen)
        _say(screen, _next(chosen, config, report.spoiled, fixed) if not failure else [])
    if failure:
        raise failure
    if report.spoiled:
        sys.exit(1)


@app.command()
def preview(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a file of chats")],
    config: ConfigFile = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="show the first N rows")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="set a ¦ between tokens")] = False,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Show rows as the model will see them: by role, what is trained on, special tokens, where a row is cut."""
    from itertools import islice

    from phinetune.data.prepare.encode_rows import describe_size, is_huge, outcomes
    from phinetune.data.read.rows import Broken, scan_rows
    from phinetune.screen.row_view import show_row

    run = _config(config, overrides)
    _check_sources([file])
    encoder, max_length = _encoder(run)
    screen = console()
    plain = screen.no_color or not screen.is_terminal
    key = "⟦ ⟧ trained on, « » special" if plain else "underlined: trained on, reversed: special"
    screen.print(f"({key})\n", highlight=False, markup=False)
    for row in islice(scan_rows(file, run.data.split), rows):
        if not isinstance(row, Broken) and is_huge(row, max_length):
            row = Broken(row.where, f"far too long to be a chat: {describe_size(row)}")
        found = row if isinstance(row, Broken) else next(outcomes([row], run.data, encoder, max_length))
        show_row(found, encoder, screen, boundaries=tokens)
    _say(screen, [f"Next: {program()} data check {file}{_with(config)}"])


@contextmanager
def _progress() -> Iterator[Callable[[], None]]:
    """A count of the rows seen, on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("checking", total=None)
        yield lambda: progress.advance(task)


def _config(file: Path | None, overrides: list[str]) -> RunConfig:
    from phinetune.config.run import load_config, make_config
    from phinetune.logs import quiet_libraries

    quiet_libraries()
    return load_config(file, overrides) if file else make_config({}, overrides)


def _chosen(files: list[str] | None, run: RunConfig) -> list[str]:
    from phinetune.data.prepare.build import weighted

    chosen = list(files or []) or [path for path, _ in weighted(run.data.train)]
    if not chosen:
        raise PhinetuneError("no file of chats: name one, or a configuration with data.train (--config CONFIG)")
    return chosen


def _held_out(run: RunConfig) -> list[str]:
    from phinetune.data.prepare.build import weighted

    return [] if isinstance(run.data.eval, float) else [path for path, _ in weighted(run.data.eval)]


def _check_sources(sources: list[str]) -> None:
    from phinetune.data.read.rows import check_source

    problems = [problem for source in sources if (problem := check_source(source))]
    if problems:
        raise DataError(problems)


def _encoder(run: RunConfig) -> tuple[Any, int | None]:
    """The encoder of a configuration and its longest row, without loading weights."""
    from phinetune.chat.encoder import make_encoder
    from phinetune.checkpoints.tokenizer import open_tokenizer
    from phinetune.training.settings import read_settings

    settings = read_settings(run.peft_config, run.training_config)
    return make_encoder(open_tokenizer(run.model), run.data.loss_on, run.data.system), settings.max_length


def _next(files: list[str], config: Path | None, spoiled: bool, fixed: Any) -> list[str]:
    if fixed:
        remaining = [f"Left to you: {what}" for what in fixed.remaining]
        return [fixed.line(), *remaining, f"Next: {program()} data check {fixed.path}{_with(config)}"]
    if spoiled:
        name = Path(files[0]).with_suffix("").name
        return [
            "A run on these rows would fail or be spoiled. Next: mend what is marked ✗, or write what can be saved:",
            f"  {program()} data check {' '.join(files)}{_with(config)} --fix {name}-clean.jsonl",
        ]
    train = f"; {program()} train {config}" if config else ""
    return [f"Next: {program()} data preview {files[0]}{_with(config)}{train}"]


def _with(config: Path | None) -> str:
    return f" --config {config}" if config else ""


def _say(screen: Any, lines: list[str]) -> None:
    screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
