"""The command line as a whole: every verb's file, and what becomes of an error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from phinetune import launched
from phinetune.cli import (
    combine,
    config,
    convert,
    curve,
    data,
    evaluate,
    export,
    merge,
    plan,
    push,
    report,
    serve,
    talk,
    train,
    tune,
)
from phinetune.errors import (
    LOST_PROCESS,
    MACHINE_FAULT,
    PhinetuneError,
    RunError,
    is_lost,
    is_out_of_memory,
    reason_of,
)
from phinetune.files import disk_trouble, is_machine_fault
from phinetune.secret_text import without_secrets
from phinetune.terminal_text import visible
from phinetune.version import versions

LIBRARIES = 2_000_000_000  # bytes of address space that torch, transformers and datasets take by themselves

app = typer.Typer(
    help="Fine-tune a Phi-3 with LoRA on your chats, and see whether it got better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
# In the order of the help.
for verb in (report, train, tune, plan, curve, evaluate, talk, merge, combine, export, push, convert, serve, config):
    app.add_typer(verb.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(versions())
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the versions, and end.")
    ] = False,
) -> None:
    """Takes what stands before a verb."""


def main() -> None:
    """Entry point. A user's mistake and a fault of the machine end with one sentence a problem, without a traceback."""
    try:
        launched.follow_launcher()
        _check_address_space()
        app(prog_name="phinetune")
    except PhinetuneError as error:
        _fail(error.problems, error)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C would end it with another status
        if launched.is_ours():
            launched.report(130, ["stopped"], error=error)
        else:
            print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _fail([_told(error)], error)


def _fail(problems: Sequence[str], error: BaseException) -> None:
    """End with `MACHINE_FAULT`, or 2 for a mistake. Of several processes our launcher says once what they report."""
    status = MACHINE_FAULT if is_machine_fault(error) else 2
    if launched.is_ours():
        launched.report(status, problems, error=error)
        sys.exit(status)
    for problem in problems:
        lead = "" if problem.startswith("  ") else "error: "  # lines of YAML are there to be pasted
        print(visible(without_secrets(f"{lead}{problem}")), file=sys.stderr)
    sys.exit(status)


def _told(error: Exception) -> str:
    """What the machine refused, in a sentence: memory, a disk, a folder, a closed pipe. Any other error is raised."""
    if is_out_of_memory(error):
        return f"the memory is not enough ({reason_of(error)}); close other programs, or raise this process's limit"
    trouble = disk_trouble(error)
    if trouble:
        return f"{trouble} ({reason_of(error)}); see to the disk and call the command again"
    if launched.has_launcher() and is_lost(error):
        return LOST_PROCESS
    if isinstance(error, OSError):
        return str(error)
    if launched.is_ours():
        launched.report(1, error=error)
        sys.exit(1)
    raise error


def _check_address_space() -> None:
    """Make sure that the libraries can be loaded: without room they end the process without a word.

    Raises:
        RunError: the limit of this shell is too low.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LIBRARIES:
        raise RunError(
            f"this shell limits the address space to {limit / 1e9:.1f} GB (`ulimit -v`), and the libraries alone take "
            f"about {LIBRARIES / 1e9:.1f} GB; raise that limit"
        )


if __name__ == "__main__":
    main()
