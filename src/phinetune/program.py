"""How the command line calls itself and where it prints; which process this is."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def program() -> str:
    """How this program can be called again: by its name where that is on the path, else by its place."""
    if shutil.which("phinetune"):
        return "phinetune"
    place = Path(sys.argv[0])
    if place.suffix == ".py":
        return "python -m phinetune.cli.app"
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def this_process() -> dict[str, Any]:
    """What tells this process from all others: host, id, and the second it began (ids are used again)."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process, as `this_process` described it, still runs on this host."""
    import psutil

    try:
        found = psutil.Process(int(process["pid"])).create_time()
        return process["host"] == socket.gethostname() and abs(found - float(process["began"])) < 1
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def console() -> Any:
    """Standard output as rich prints to it; wide enough for tables where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns))
