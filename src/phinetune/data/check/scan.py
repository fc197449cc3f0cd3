"""Reads the rows of a file for a check, also where a place is broken or a row is far too long to be a chat."""

from __future__ import annotations

from collections.abc import Iterator

from phinetune.data.prepare.encode_rows import describe_size, is_huge
from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.row import Broken, Row
from phinetune.errors import DataError


def scan_file(file: str, split: str, name: str | None = None, text_by: str = "paragraph") -> Iterator[Row | Broken]:
    """The rows and broken places of a file, in order. A source that can't be read at all is one broken place."""
    try:
        yield from scan_rows(file, split, name, text_by=text_by)
    except DataError as error:
        yield Broken(file, str(error))


def as_row(item: Row | Broken, max_length: int | None) -> Row | None:
    """The row to check. For a broken place, it is the row that was salvaged from it.

    None if there is no row, or it is far too long to be a chat.
    """
    if isinstance(item, Row):
        row = item
    elif item.salvaged is not None:
        row = Row(item.where, item.salvaged)
    else:
        return None
    return None if is_huge(row, max_length) else row


def unreadable(item: Row | Broken) -> tuple[str, str]:
    """The kind of finding and its detail, for an item that `as_row` makes no row of."""
    if isinstance(item, Row):
        return "huge", describe_size(item)
    return ("huge" if item.salvaged is not None else item.kind), item.problem
