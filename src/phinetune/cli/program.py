"""How the command line calls itself."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
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


def again(options: Mapping[str, object], overrides: Sequence[str]) -> str:
    """Options as a command line has them, a space in front: a command that is proposed needs them to mean the same.

    Args:
        options: by name, `--study` for example. Those that are None or empty were not given.
        overrides: of `--set`.
    """
    given = [*options.items(), *(("--set", one) for one in overrides)]
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in given if value not in (None, ""))
