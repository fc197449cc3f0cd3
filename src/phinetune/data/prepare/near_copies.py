"""Marks rows that are nearly equal: within a set that is to be split, or between training rows and held-out rows.

What is found in large sets is kept with the prepared data, and found again by content.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from phinetune.data.prepare.cache import cached_folder, code_digest
from phinetune.data.prepare.copies import Groups, SetKeys
from phinetune.data.prepare.duplicates import MAX_ROWS, NearDuplicates

logger = logging.getLogger(__name__)

# Looking for a near copy of a row takes about half a millisecond. So many rows are compared with each other, and so
# many training rows with those that are held out.
NEAR_ROWS = MAX_ROWS
NEAR_TRAINED = 300_000
LARGE = 10_000  # rows: that they are compared is said, and what is found is kept
FILE = "near.json"
Near = list[int | None]


def with_near(keys: SetKeys) -> SetKeys:
    """The set with what is nearly equal in it; as it is if there are too many rows to look."""
    if len(keys.rows) > NEAR_ROWS:
        return keys
    (near,) = _kept([keys], lambda: [_within(keys)]) or [None]
    return replace(keys, near=near)


def near_between(train: SetKeys, held_out: SetKeys) -> tuple[SetKeys, SetKeys]:
    """Both sets with what held-out rows are nearly equal to among the training rows; as they are if there are too many
    rows to look.
    """
    if len(held_out.rows) > NEAR_ROWS or len(train.rows) > NEAR_TRAINED:
        return train, held_out
    trained, held = _kept([train, held_out], lambda: _between(train, held_out)) or (None, None)
    return replace(train, near=trained), replace(held_out, near=held)


def _kept(sets: list[SetKeys], find: Callable[[], list[Near | None]]) -> list[Near | None]:
    """What `find` finds in the sets; of large ones it is kept."""
    rows = sum(len(one.rows) for one in sets)
    if rows < LARGE:
        return find()

    def fill(folder: Path) -> None:
        logger.info("looking for near copies among %s rows", f"{rows:,}")
        (folder / FILE).write_text(json.dumps(find()), encoding="utf-8")

    made: list[Near | None] = json.loads((cached_folder(_key(sets), fill) / FILE).read_text(encoding="utf-8"))
    return made


def _key(sets: list[SetKeys]) -> str:
    total = hashlib.sha256(f"near {code_digest()}".encode())
    for one in sets:
        total.update(f" {len(one.rows)} ".encode())
        for row in one.rows:
            total.update(row if isinstance(row, bytes) else b" ")
    return total.hexdigest()[:32]


def _within(keys: SetKeys) -> Near | None:
    """For each row the number of the first one that it is nearly equal to, its own if others are equal to it."""
    found = NearDuplicates()
    matches = [found.add(place, mine) for place, mine in enumerate(keys.shingles())]
    if found.lacks_rows:
        return None
    heads = set(matches)
    return [place if place in heads else match for place, match in enumerate(matches)]


def _between(train: SetKeys, held_out: SetKeys) -> list[Near | None]:
    """For each row of both sets the group of held-out rows that a training row joins; None if it is in none."""
    found = NearDuplicates()
    for place, mine in enumerate(held_out.shingles()):
        found.keep(place, mine)
    if found.lacks_rows:
        return [None, None]
    groups, copies, trained = Groups(len(held_out.rows)), set[int](), Near()
    for mine in train.shingles():
        alike = found.find_all(mine, copies)
        copies.update(alike)
        for other in alike[1:]:
            groups.join(alike[0], other)
        trained.append(alike[0] if alike else None)
    held = [groups.of(place) if place in copies else None for place in range(len(held_out.rows))]
    return [[None if place is None else groups.of(place) for place in trained], held]
