"""Writing so that a crash leaves the old file or the new one, never half of either."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a temporary file beside it, synced, then renamed over it."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """`write_text` of lines that are made one by one; where making one raises, nothing is written."""
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
# safetensors (Rust) and torch's zip writer raise types of their own and spell the number out.
DISK_FULL_SIGNS = ("No space left on device", *(f"os error {number})" for number in DISK_FULL))


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` in one rename when the block ends well, and vanishes otherwise.

    An existing `target` is replaced. The staging folder lies beside it, so the rename stays on one file system.
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
    """Sync `stage` to disk and rename it to `target`, replacing what stands there."""
    sync_tree(stage)
    if target.exists():
        shutil.rmtree(target)
    os.replace(stage, target)
    _sync(target.parent)


def publish_files(stage: Path, target: Path) -> None:
    """Sync the files of `stage` to disk and rename each into the folder `target`, over what stands there."""
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
