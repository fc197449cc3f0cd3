"""The error for one row of data."""

from __future__ import annotations

from typing import Literal

from phinetune.errors import DataError

Trouble = Literal["form", "roles", "content", "tools", "system", "template", "labels", "untrained", "letters"]


class RowError(DataError):
    """Says what is wrong with one row. The caller knows which row it is.

    Attributes:
        kind: what the problem is about. `phinetune data check` groups findings by it.
    """

    def __init__(self, problem: str, kind: Trouble = "form") -> None:
        super().__init__(problem)
        self.kind: Trouble = kind
