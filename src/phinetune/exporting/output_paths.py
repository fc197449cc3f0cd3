"""The place of an export. Nothing is overwritten unasked, and the export appears whole or not at all."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.files import publish_files

# Tokens. A longer context takes memory that is seldom used, and every client has an option for a longer one.
LONGEST_CONTEXT = 4096


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        path: the file or folder that was written.
        what: what was written, in a few words.
        size: bytes that were written.
        commands: the commands that run it, one per item.
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


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def quoted(path: Path | str) -> str:
    """A path, quoted for a shell."""
    return shlex.quote(str(path))


def check_free(folder: Path, overwrite: bool, is_own: Callable[[Path], bool]) -> None:
    """Make sure that an export may be written to `folder`.

    It may if the folder does not exist or is empty, or if it holds only an earlier export and `overwrite` is on.

    Args:
        is_own: tells whether a folder holds an export of this kind and nothing else.

    Raises:
        ModelError: the place is taken.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ModelError(f"{folder}: is there already and is not a folder; name another place with --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_own(folder):
        raise ModelError(f"{folder}: holds files that do not come from an export; name another place with --out")
    if not overwrite:
        raise ModelError(f"{folder}: is there already; name another place with --out, or replace it with --overwrite")


@contextmanager
def staged_file(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary path to write to. At the block's end the file is renamed to `target`; after an error it is gone.

    Raises:
        ModelError: `target` exists and may not be overwritten, or is a folder.
    """
    if os.path.lexists(target) and not overwrite:
        raise ModelError(f"{target}: is there already; name another place with --out, or replace it with --overwrite")
    if target.is_dir():
        raise ModelError(f"{target}: is a folder; name a file with --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.partial-") as stage:
        yield Path(stage) / target.name
        publish_files(Path(stage), target.parent)
