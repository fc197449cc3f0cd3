"""Holds a checkpoint for a job or an export that waits: its run deletes its older ones while it trains."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phinetune.files import sync_folder, sync_tree
from phinetune.manifest import MANIFEST
from phinetune.run_folder import CONFIG, RESULTS, RunFolder
from phinetune.serving.job_places import HELD, JobPlaces
from phinetune.serving.models import no_model
from phinetune.serving.state import ServerState

ONLY_TO_GO_ON = (".pt", ".pth")  # endings of what a run needs beside the adapter: the optimizer, random numbers


@contextmanager
def held(state: ServerState, model: str, adapter: str, place: Path) -> Iterator[str]:
    """A context with a model's adapter, as it is now, for work that begins later. If the context raises, none is held.

    A checkpoint is linked into `place`, with what it is opened by. A run's own adapter stays where it is.

    Args:
        adapter: its folder in the server's.

    Raises:
        ApiError: its run has just deleted it.
    """
    folder = state.folder / adapter
    if not RunFolder(folder.parent).is_run:
        yield adapter
        return
    try:
        try:
            linked = _linked(folder, place)
        except FileNotFoundError:
            raise no_model(model) from None
        yield str(linked.relative_to(state.folder))
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def sweep_held(state: ServerState) -> None:
    """Delete what a server that was killed held for jobs that it never acknowledged."""
    known = {JobPlaces(state.folder, row["id"]).held for row in state.store.rows("SELECT id FROM jobs")}
    for place in (state.folder / "jobs").glob(f"*{HELD}"):
        if place not in known:
            shutil.rmtree(place, ignore_errors=True)


def _linked(checkpoint: Path, place: Path) -> Path:
    """Link a checkpoint's files into a folder of the same name, beside its run's: it is opened by both."""
    run, target = checkpoint.parent, place / checkpoint.parent.name / checkpoint.name
    # All that its manifest names is there, or it is being deleted.
    named = [Path(name) for name in json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]]
    for name in named:
        if name.suffix not in ONLY_TO_GO_ON:
            _link(checkpoint / name, target / name)
    for beside in (CONFIG, RESULTS):
        if (run / beside).is_file():
            _link(run / beside, target.parent / beside)
    sync_tree(place)
    sync_folder(place.parent)
    return target


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(file, target)
