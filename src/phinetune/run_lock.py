"""The lock of a run's folder: one process writes there at a time, and whoever comes second is told which."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phinetune.errors import RunError, reason_of
from phinetune.files import write_text
from phinetune.liveness import is_alive, is_on_this_host, named, this_process

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which this process alone writes into a run's folder. The folder is made if it is missing.

    A lock that a process left behind is taken over, with a line in the log. A folder that was made for the lock and
    is still empty at the end is deleted again.

    Raises:
        RunError: another process writes there, or may do so on another host; or the folder can't be written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder)
    except OSError as error:
        _delete_empty(made)
        raise RunError(f"output_dir {folder} can't be written to: {reason_of(error)}") from error
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not a process that was forked meanwhile
            with suppress(OSError):  # what stays of it is taken over by the next run
                (folder / LOCK).unlink()
            _delete_empty(made)


def refuse_if_locked(folder: Path) -> None:
    """Make sure that no other process writes into a run's folder.

    Raises:
        RunError: one does, or may do so on another host.
    """
    holder = _holder(folder)
    if holder is None:
        return
    if not is_on_this_host(holder):
        raise RunError(
            f"{folder}: {named(holder)} has begun to write there, and from here it can't be seen whether it still "
            f"runs; if it has ended, delete {folder / LOCK} and start again"
        )
    if is_alive(holder):
        raise RunError(
            f"{folder}: {named(holder)} is writing a run there; wait until it has ended, stop it "
            f"(`kill {holder.get('pid')}` saves a checkpoint first), or name another folder"
        )


def _take(folder: Path) -> None:
    with _alone(folder):
        refuse_if_locked(folder)
        holder = _holder(folder)
        if holder:
            logger.warning("%s: the lock of %s, which has ended, is taken over", folder, named(holder))
        write_text(folder / LOCK, json.dumps(this_process()))


def _holder(folder: Path) -> dict[str, Any] | None:
    """The process that a lock names; None if there is no lock, or one that names nobody."""
    try:
        tree = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # locks are written whole: an odd one is no lock
        return None
    return tree if isinstance(tree, dict) and "pid" in tree else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A context for the moment in which a lock is looked at and taken, so that of two processes one gets it."""
    if sys.platform == "win32":  # it locks no folder; the moment is short
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # nor do some file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _delete_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it holds something, or is gone already
            return
