"""How the command line calls itself and where it prints."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any


def program() -> str:
    """How this program can be called again: by its name where that is on the path, else by its place."""
    if shutil.which("phinetune"):
        return "phinetune"
    place = Path(sys.argv[0])
    if place.suffix == ".py":
        return "python -m phinetune.cli"
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def console() -> Any:
    """Standard output as rich prints to it; wide enough for tables where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns))
