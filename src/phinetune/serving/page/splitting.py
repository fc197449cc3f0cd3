"""Keeps some rows of a file aside, to measure afterwards what was learnt: two new files of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from phinetune.serving.errors import ApiError
from phinetune.serving.files import FINE_TUNE, find_file, keep_lines
from phinetune.serving.job_places import file_place
from phinetune.serving.page.forms import Split
from phinetune.serving.state import ServerState


def split_file(state: ServerState, file: str, share: float) -> Split:
    """Two new files of one: about a `share` of its rows, and the others. Equal rows stay on one side.

    The same file is split in the same way each time: a row's digest decides.

    Raises:
        ApiError: there is no such file, or it has too few rows that differ.
    """
    row = find_file(state, file, "file_id")
    if row["purpose"] != FINE_TUNE:
        raise ApiError(400, f"{file} holds no rows to train on.", param="file_id")
    place = file_place(state.folder, file)
    aside = _aside(place, share)
    stem = row["filename"].rpartition(".")[0] or row["filename"]
    kept = keep_lines(state, _lines(place, aside, held_out=False), f"{stem}-train.jsonl")
    held_out = keep_lines(state, _lines(place, aside, held_out=True), f"{stem}-held-out.jsonl")
    return Split(training_file=kept["id"], validation_file=held_out["id"])


def _aside(place: Path, share: float) -> set[bytes]:
    """The digests of the rows that are kept aside."""
    with place.open("rb") as file:
        digests = sorted({_digest(line) for line in file if line.strip()})
    if len(digests) < 2:
        message = "The file has one row, or equal ones alone; none can be kept aside."
        raise ApiError(400, message, code="too_few_rows", param="file_id")
    return set(digests[: min(len(digests) - 1, max(1, round(share * len(digests))))])


def _lines(place: Path, aside: set[bytes], held_out: bool) -> Iterator[str]:
    with place.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if line.strip() and (_digest(line.encode()) in aside) is held_out:
                yield line.rstrip("\r\n") + "\n"


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line.removeprefix(b"\xef\xbb\xbf").strip()).digest()[:12]
