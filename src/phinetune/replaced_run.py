"""Keeps a run that is being replaced until its successor has something to go on from, and puts it back otherwise.

The old run's files move into the folder `.replaced` of the run's folder, each by one rename, and config.yaml is copied
last. So whatever a crash leaves, the next start can tell: without a config.yaml in `.replaced` the move was under way;
with it the new run has begun. Nothing is deleted before the other run is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from phinetune.files import remove, sync_folder, write_text

# The folder that holds the old run; what it is called while its files go back, and while it is deleted.
REPLACED, RETURNING, DROPPED = ".replaced", ".returning", ".dropped"
FOLDERS = (REPLACED, RETURNING, DROPPED)


def set_aside(folder: Path, own: Sequence[Path], mark: Path) -> None:
    """Move the files and folders of a run into `.replaced`.

    Args:
        own: all of them but `mark`.
        mark: the file that shows whose folder it is; it stays, and is copied when all else has moved.
    """
    aside = folder / REPLACED
    aside.mkdir()
    for place in own:
        os.replace(place, aside / place.name)
    sync_folder(aside)
    sync_folder(folder)
    write_text(aside / mark.name, mark.read_text(encoding="utf-8"))
    sync_folder(aside)


def drop(folder: Path) -> None:
    """Delete the run that was set aside, if there is one: its successor has taken its place."""
    if (folder / REPLACED).is_dir():
        os.replace(folder / REPLACED, folder / DROPPED)
    shutil.rmtree(folder / DROPPED, ignore_errors=True)


def settle(folder: Path, own: Sequence[Path], mark: str, has_work: bool) -> bool:
    """Finish what a crash left half done. Returns whether the run that was set aside is back in its place.

    Args:
        own: all that lies in the folder of either run, but for the mark.
        mark: the name of the file that shows whose folder it is.
        has_work: whether there is something in the folder to go on from.
    """
    aside, returning = folder / REPLACED, folder / RETURNING
    begun = (aside / mark).is_file()
    if begun and has_work:
        drop(folder)
    if aside.is_dir():
        for place in own if begun else ():
            remove(place)
        os.replace(aside, returning)
    shutil.rmtree(folder / DROPPED, ignore_errors=True)
    if not returning.is_dir():
        return False
    for place in sorted(returning.iterdir(), key=lambda place: place.name == mark):
        os.replace(place, folder / place.name)
    sync_folder(folder)
    returning.rmdir()
    return True
