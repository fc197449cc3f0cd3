"""The command line as a whole: every verb's file, and what becomes of an error."""

from __future__ import annotations

import sys

import typer

from phinetune.cli import config, convert, data, evaluate, export, merge, plan, push, report, talk, train
from phinetune.errors import PhinetuneError

app = typer.Typer(
    help="Fine-tune a Phi-3 with LoRA on your chats, and see whether it got better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
# In the order of the help.
for verb in (report, train, plan, evaluate, talk, merge, export, push, convert, config):
    app.add_typer(verb.app)


def main() -> None:
    """Entry point. A user's mistake ends with one sentence a problem and status 2, never with a traceback."""
    try:
        app(prog_name="phinetune")
    except PhinetuneError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that can't be written, a full disk, a closed pipe
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
