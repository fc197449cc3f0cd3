"""A row of a data source, and a place where no row can be read."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Row(NamedTuple):
    """One record. `where` is its place, for example `chats.jsonl:17`."""

    where: str
    fields: dict[str, Any]


class Broken(NamedTuple):
    """A place where no row can be read.

    Attributes:
        problem: the reason.
        kind: `encoding` if the bytes are not UTF-8, else `broken`.
        salvaged: the row as it is probably meant, if it can be guessed.
    """

    where: str
    problem: str
    kind: Literal["broken", "encoding"] = "broken"
    salvaged: dict[str, Any] | None = None
