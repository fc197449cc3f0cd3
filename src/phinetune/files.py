"""Writes files and folders so that a crash leaves the old one or the new one, never an incomplete one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: into a temporary file beside it, which is synced and then renamed."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """`write_text` for lines that are made one by one. If making one raises an error, nothing is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors (Rust) and torch's zip writer raise error types of their own, with the number in the text.
DISK_FULL_SIGNS = ("No space left on device", *(f"os error {number})" for number in DISK_FULL))


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A context with an empty folder to fill. When the block ends, one rename makes the folder `target`.

    If the block raises an error, the folder is deleted. An existing `target` is replaced. The folder is made beside
    `target`, so the rename stays on one file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    stage.chmod(0o777 & ~_umask())
    try:
        yield stage
        publish_folder(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish_folder(stage: Path, target: Path) -> None:
    """Sync `stage` to disk and rename it to `target`. An existing `target` is replaced."""
    sync_tree(stage)
    if target.exists():
        shutil.rmtree(target)
    os.replace(stage, target)
    _sync(target.parent)


def publish_files(stage: Path, target: Path) -> None:
    """Sync the files in `stage` to disk and move each into the folder `target`. Files of the same name are replaced."""
    sync_tree(stage)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(stage.iterdir()):
        os.replace(file, target / file.name)
    _sync(target)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder under `folder`."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(sign in str(error) for sign in DISK_FULL_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
