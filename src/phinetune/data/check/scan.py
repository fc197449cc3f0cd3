"""What a look at a file takes in: rows, rows that only look like one, and places that hold none."""

from __future__ import annotations

from collections.abc import Iterator

from phinetune.data.prepare.encode_rows import describe_size, is_huge
from phinetune.data.read.rows import Broken, Row, scan_rows
from phinetune.errors import DataError


def scan_file(file: str, split: str) -> Iterator[Row | Broken]:
    """Rows and broken places in order; a source that can't be read at all is one broken place."""
    try:
        yield from scan_rows(file, split)
    except DataError as error:
        yield Broken(file, str(error))


def as_row(found: Row | Broken, max_length: int | None) -> Row | None:
    """The row to look at, as if its bytes were mended where they are no UTF-8; None where no chat stands there."""
    if isinstance(found, Row):
        row = found
    elif found.salvaged is not None:
        row = Row(found.where, found.salvaged)
    else:
        return None
    return None if is_huge(row, max_length) else row


def unreadable(found: Row | Broken) -> tuple[str, str]:
    """Of what is no row to look at: the kind of finding, and its detail."""
    if isinstance(found, Row):
        return "huge", describe_size(found)
    return ("huge" if found.salvaged is not None else found.kind), found.problem
