"""Builds the folder that a crash leaves from the log of a process's file operations (`faults.c`).

A power failure loses what was not flushed. Two extremes of what a file system may keep are built, as ALICE does
(Pillai et al., OSDI 2014): every name as it was last and only the flushed bytes, or only the names whose folder was
flushed, too.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Operation(NamedTuple):
    """One operation of the log.

    Attributes:
        kind: open `o`, open and empty `t`, write `w`, cut `c`, sync `s`, rename `r`, exchange `x`, unlink `u`, rmdir
            `d`, mkdir `m`, link `l`, chmod `p`.
        number: of the operation, from 1.
        path, second: absolute; `second` is the new name of a rename or a link.
        offset: of the written bytes; the new size of a file that is cut.
        data: the written bytes.
    """

    kind: str
    number: int
    path: str
    second: str
    offset: int
    data: bytes


def read_log(file: Path) -> Iterator[Operation]:
    """The operations of a log; a last record that is cut off is left out."""
    log = file.read_bytes()
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        if place + size > len(log):
            raise EOFError
        place += size
        return log[place - size : place]

    try:
        while place < len(log):
            kind, (number,) = take(1).decode(), struct.unpack("<q", take(8))
            path, second = (take(struct.unpack("<I", take(4))[0]).decode() for _ in range(2))
            offset, size = struct.unpack("<qQ", take(16))
            yield Operation(kind, number, path, second, offset, take(size))
    except EOFError:
        return


@dataclass(eq=False)
class _File:
    """The bytes of a file: as the program sees them, and as they were flushed last."""

    now: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""


@dataclass
class Disk:
    """The files and folders under a root, by absolute path.

    Attributes:
        names, folders: as the program sees them.
        kept_names, kept_folders: those of folders as they were flushed last.
    """

    root: str
    names: dict[str, _File] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    kept_names: dict[str, _File] = field(default_factory=dict)
    kept_folders: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, root: Path) -> Disk:
        """What lies under a folder now, all of it flushed."""
        disk = cls(str(root))
        for place in sorted(root.rglob("*")):
            if place.is_dir():
                disk.folders.add(str(place))
            else:
                held = place.read_bytes()
                disk.names[str(place)] = _File(bytearray(held), held)
        disk.kept_names, disk.kept_folders = dict(disk.names), set(disk.folders)
        return disk

    def apply(self, one: Operation) -> None:
        """Do one operation of the log."""
        kind, path = one.kind, one.path
        if kind in "ot":
            file = self.names.setdefault(path, _File())
            if kind == "t":
                file.now.clear()
        elif kind == "w":
            now = self._file(path).now
            now.extend(bytes(max(0, one.offset - len(now))))
            now[one.offset : one.offset + len(one.data)] = one.data
        elif kind == "c":
            now = self._file(path).now
            now.extend(bytes(max(0, one.offset - len(now))))
            del now[one.offset :]
        elif kind == "s":
            self._flush(path)
        elif kind == "m":
            self.folders.add(path)
        elif kind == "d":
            self.folders.discard(path)
        elif kind == "u":
            self.names.pop(path, None)
        elif kind == "l":
            self.names[one.second] = self._file(path)
        elif kind == "r":
            self._rename(path, one.second)
        elif kind == "x":
            self._rename(path, path + "\0")
            self._rename(one.second, path)
            self._rename(path + "\0", one.second)

    def _file(self, path: str) -> _File:
        if path not in self.names and path not in self.folders:
            # safetensors renames its temporary file past the C library, so the log lacks that rename.
            parent = path.rpartition("/")[0]
            renamed = next((name for name in self.names if name.startswith(f"{parent}/.tmp")), None)
            self.names[path] = self.names.pop(renamed) if renamed else _File()
        return self.names[path]

    def _flush(self, path: str) -> None:
        if path not in self.folders and path != self.root:
            file = self._file(path)
            file.flushed = bytes(file.now)
            return
        # A flushed folder keeps the names in it, and the folder's own name.
        self.kept_folders.add(path)
        for kept, seen in ((self.kept_names, self.names), (self.kept_folders, self.folders)):
            own = {name for name in [*kept, *seen] if name.rpartition("/")[0] == path}
            for name in own:
                if name not in seen:
                    kept.pop(name, None) if isinstance(kept, dict) else kept.discard(name)
                elif isinstance(kept, dict):
                    kept[name] = self.names[name]
                else:
                    kept.add(name)

    def _rename(self, old: str, new: str) -> None:
        """Rename a file or a folder; what was kept of a folder's inside goes with it."""
        if old in self.folders:
            self.folders = {_moved(name, old, new) for name in self.folders}
            self.names = {_moved(name, old, new): file for name, file in self.names.items()}
            # The inside of a folder belongs to the folder, whatever its name: it is kept under the new one, once that
            # is kept, and was kept under the old one before.
            inside = {name: file for name, file in self.kept_names.items() if name.startswith(old + "/")}
            self.kept_names |= {_moved(name, old, new): file for name, file in inside.items()}
            self.kept_folders |= {_moved(name, old, new) for name in self.kept_folders if name.startswith(old + "/")}
        else:
            self.names[new] = self._file(old)
            del self.names[old]

    def write(self, names_kept: str) -> None:
        """Make the root what a crash leaves.

        Args:
            names_kept: `all` (names as they were last, flushed bytes only) or `flushed` (flushed names and bytes only).
        """
        root = Path(self.root)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        names = self.names if names_kept == "all" else self.kept_names
        folders = self.folders if names_kept == "all" else self.kept_folders
        for folder in sorted(folders):
            if Path(folder).parent.is_dir():
                Path(folder).mkdir(exist_ok=True)
        for name, file in names.items():
            if Path(name).parent.is_dir():
                Path(name).write_bytes(file.flushed)


def _moved(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name == old or name.startswith(old + "/") else name
