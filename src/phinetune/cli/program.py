"""How the command line calls itself."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from phinetune.launched import PROGRAM, is_ours


def program() -> str:
    """How this program can be called again: by its name where that is on the path, else by its place. In `--nproc`'s
    processes it is the launcher, which is what the user called.
    """
    if is_ours():
        return os.environ[PROGRAM]
    if shutil.which("phinetune"):
        return "phinetune"
    place = Path(sys.argv[0])
    if place.suffix == ".py":
        return "python -m phinetune"
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)
