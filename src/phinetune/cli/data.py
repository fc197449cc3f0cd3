"""`phinetune data`: look at chats before a run does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from phinetune.cli.program import again, program
from phinetune.loading import libraries
from phinetune.screen.console import say, stdout

if TYPE_CHECKING:
    from phinetune.api.columns import Columns
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
    with libraries():
        from phinetune.api.data import check_config
        from phinetune.screen.check import show_check
        from phinetune.screen.console import stderr
        from phinetune.screen.progress import counting_rows

    run = _config(config, overrides)
    with counting_rows(stderr()) as on_row:
        found = check_config(run, files or [], held_out, fix, on_row)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        screen = stdout()
        show_check(found.report, screen)
        more = again({"--config": config}, overrides)
        train = f"; {program()} train {config}{again({}, overrides)}" if config else ""
        say(screen, _next(list(found.files), more, train, found) if not found.failure else [])
    if found.failure:
        raise found.failure
    if found.report.spoiled:
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
    with libraries():
        from phinetune.api.data import preview_config
        from phinetune.screen.row_view import needs_marks, show_row

    screen = stdout()
    found = preview_config(_config(config, overrides), file, rows)
    key = "⟦ ⟧ trained on, « » special" if needs_marks(screen) else "underlined: trained on, reversed: special"
    say(screen, f"({key})\n")
    for row in found:
        show_row(row, screen, boundaries=tokens)
    say(screen, f"Next: {program()} data check {file}{again({'--config': config}, overrides)}")


@app.command()
def columns(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a file whose columns have names of their own")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="show the first N rows as they are read")] = 2,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="CONFIG", help="write a configuration with the proposal to a new file"),
    ] = None,
    config: ConfigFile = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Propose which column is the question and which the answer, from their names. Needs no model."""
    from phinetune.api.columns import columns_of
    from phinetune.screen.columns import show_columns, show_turns

    screen = stdout()
    found = columns_of(_config(config, overrides).data, file, rows, out)
    show_columns(file, found.rows, ((one.name, one.filled, one.example) for one in found.columns), screen)
    say(screen, ["", _what_was_found(found)])
    for row in found.shown:
        show_turns(row.where, row.messages, row.problem, screen)
    name = out or Path("run.yaml")
    told = f"Wrote {out}" if out else f"As a configuration, for a file {name} (--out {name} writes it):"
    say(screen, ["", told, *([] if out else ["", *found.config, ""])])
    say(screen, f"Next: {program()} data check --config {name}; {program()} train {name}")


def _what_was_found(found: Columns) -> str:
    made = found.proposal
    if made.form:
        return f"The rows have the form `{made.form}`, so nothing has to be said of the columns. They are read as:"
    if not made.knobs():
        return "No two columns hold words, so say yourself which is what: columns: {user: …, assistant: …}"
    doubt = " The names tell nothing, so this is a guess; exchange the names if it is wrong." if made.guessed else ""
    return "\n".join(["Proposed, below `data:`." + doubt, *made.yaml(), "Rows read that way:"])


def _config(file: Path | None, overrides: list[str]) -> RunConfig:
    from phinetune.config.run import load_config, make_config

    return load_config(file, overrides) if file else make_config({}, overrides)


def _next(files: list[str], more: str, train: str, found: Any) -> list[str]:
    if fixed := found.fixed:
        remaining = [f"Left to you: {what}" for what in fixed.remaining]
        return [fixed.line(), *remaining, f"Next: {program()} data check {fixed.path}{more}"]
    if found.report.spoiled:
        name = Path(files[0]).with_suffix("").name
        return [
            "A run on these rows would fail or be spoiled. Next: mend what is marked ✗, or write what can be saved:",
            f"  {program()} data check {' '.join(files)}{more} --fix {name}-clean.jsonl",
        ]
    return [f"Next: {program()} data preview {files[0]}{more}{train}"]
