"""Where the terminal is printed to."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from phinetune.terminal_text import visible

KEPT = "\n\t"  # control characters that a terminal may get
__all__ = ["Console", "say", "silent", "stderr", "stdout"]


class Screen(Console):
    """A console that shows text as text: neither rich's markup nor a terminal's escapes in it act.

    What is shown comes from strangers' files: answers, names, rows. Colours come from `Text` and `style` only.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as rich lays it out; rich itself would take some control characters away in silence."""
        return super().render_str(visible(text, KEPT), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of what is printed, whatever it was made of."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, KEPT))


def stdout() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    return Screen(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns))


def stderr() -> Console:
    """Standard error, where the library prints unless it is given a console."""
    return Screen(stderr=True)


def silent() -> Console:
    """A console that prints nothing."""
    return Screen(quiet=True)


def say(console: Console, lines: str | Sequence[str], style: str | None = None) -> None:
    """Print lines as they are: no markup, no colours of rich's own, no wrapping."""
    text = lines if isinstance(lines, str) else "\n".join(lines)
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
