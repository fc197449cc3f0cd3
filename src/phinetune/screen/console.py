"""Where the terminal is printed to."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.console import Console

__all__ = ["Console", "say", "silent", "stderr", "stdout"]


def stdout() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns))


def stderr() -> Console:
    """Standard error, where the library prints unless it is given a console."""
    return Console(stderr=True)


def silent() -> Console:
    """A console that prints nothing."""
    return Console(quiet=True)


def say(console: Console, lines: str | Sequence[str], style: str | None = None) -> None:
    """Print lines as they are: no markup, no colours of rich's own, no wrapping."""
    text = lines if isinstance(lines, str) else "\n".join(lines)
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
