"""Writes files and folders so that a crash leaves the old one or the new one, never an incomplete one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phinetune.errors import MachineError, is_out_of_memory

PRIVATE = 0o600  # of files that hold the user's text: for the user alone


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write `text` to `path` atomically: into a temporary file beside it, which is synced and then renamed.

    Args:
        private: a new file is for the user alone. One that is there keeps its mode, so that it can be shared.
    """
    write_lines(path, [text], private=private)


def write_lines(path: Path, lines: Iterable[str], *, private: bool = False) -> None:
    """`write_text` for lines that are made one by one. If making one raises an error, nothing is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _mode(path, private))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


WINDOWS = os.name == "nt"  # it opens no folder, and flushes no file that was opened for reading alone
# What a rename to a folder says if another process has put something there in the meantime.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
# What a disk reports, by the system's number: in an OSError, or in the text of an error of a library in Rust.
DISK_TROUBLES = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would grow past the limit of file sizes (`ulimit -f`, or the file system's own)",
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the file system can only be read",
}
# What torch says of a file that it could not write to its end: the disk is full or failed, and it does not say which.
CUT_SHORT = ("unexpected pos", "PytorchStreamWriter failed", "file write failed", "iostream error")
FAILED_WRITE = "a file could not be written to its end: the disk is full, or reports an error"


@contextmanager
def staged_folder(target: Path, *, private: bool = False) -> Iterator[Path]:
    """A context with an empty folder to fill. When the block ends, one rename makes the folder `target`.

    A private folder is for the user alone.

    If the block raises an error, the folder is deleted. An existing `target` is replaced. The folder is made beside
    `target`, so the rename stays on one file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    stage.chmod(0o700 if private else 0o777 & ~_umask())
    try:
        yield stage
        publish_folder(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish_folder(stage: Path, target: Path) -> None:
    """Sync `stage` to disk and rename it to `target`.

    What is at `target` is moved aside first and deleted last: a folder, a file, or a link (not what it points to). Of
    several processes that publish to one place at the same time, the last one wins.
    """
    sync_tree(stage)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.replaced-") as aside:
        while True:
            with suppress(FileNotFoundError):
                os.replace(target, tempfile.mkdtemp(dir=aside) if _is_folder(target) else Path(aside) / "file")
            try:
                os.replace(stage, target)
                break
            except OSError as error:
                if error.errno not in TAKEN:
                    raise
        sync_folder(target.parent)


def remove(path: Path) -> None:
    """Delete a file, a folder with all in it, or a link (not what it points to). It may be gone already."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def publish_files(stage: Path, target: Path) -> None:
    """Sync the files in `stage` to disk and move each into the folder `target`. Files of the same name are replaced."""
    sync_tree(stage)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(stage.iterdir()):
        os.replace(file, target / file.name)
    sync_folder(target)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder under `folder`."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """fsync the names in a folder, so that they survive a power cut."""
    _sync(folder)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def disk_trouble(error: BaseException | None) -> str | None:
    """What is wrong with a disk, if an error or one that caused it says so; None if they don't."""
    found = None
    while error is not None:
        for number, trouble in DISK_TROUBLES.items():
            signs = (f"(os error {number})", os.strerror(number))
            if (isinstance(error, OSError) and error.errno == number) or any(sign in str(error) for sign in signs):
                return trouble
        if any(sign in str(error) for sign in CUT_SHORT):
            found = FAILED_WRITE
        error = error.__cause__ or error.__context__
    return found


def is_machine_fault(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that memory ran out or that a disk is full or failed."""
    if disk_trouble(error):
        return True
    while error is not None:
        if isinstance(error, MachineError) or is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(path: Path) -> None:
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(path: Path, private: bool) -> int:
    if path.is_file():
        return path.stat().st_mode & 0o777
    return PRIVATE if private else 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
