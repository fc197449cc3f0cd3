"""Where an export goes: nothing is overwritten unasked, and it appears whole or not at all."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.files import publish_files

LONGEST_CONTEXT = 4096  # tokens; a longer one takes memory that is seldom used, and every client can be told another


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: the file or folder written.
        what: what it is, in a few words.
        size: bytes written.
        commands: what runs it, line by line.
        notes: what the user should know about it.
    """

    path: Path
    what: str
    size: int
    commands: Sequence[str]
    notes: Sequence[str] = ()

    def report(self, program: str = "phinetune") -> list[str]:
        """What to tell the user; `program` is how phinetune is called."""
        commands = [f"{program}{line.removeprefix('phinetune')}" if _is_own(line) else line for line in self.commands]
        return [
            f"Wrote {self.path}: {self.what}, {readable_size(self.size)}",
            *[f"Note: {note}" for note in self.notes],
            "Run it with:",
            *[f"  {command}" for command in commands],
        ]


def _is_own(command: str) -> bool:
    return command.startswith("phinetune ")


def readable_size(size: int) -> str:
    """Bytes as kB, MB or GB with three figures: 143 MB, 1.09 GB."""
    value, unit = size / 1e3, "kB"
    for larger in ("MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1e3, larger
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def quoted(path: Path | str) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


@contextmanager
def staged_file(target: Path, overwrite: bool) -> Iterator[Path]:
    """A path to write to that becomes `target` in one rename when the block ends well, and vanishes otherwise.

    Raises:
        ModelError: `target` is there and is not to be overwritten, or is no file.
    """
    if os.path.lexists(target) and not overwrite:
        raise ModelError(f"{target}: is there already; name another place with --out, or replace it with --overwrite")
    if target.is_dir():
        raise ModelError(f"{target}: is a folder; name a file with --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.partial-") as stage:
        yield Path(stage) / target.name
        publish_files(Path(stage), target.parent)
