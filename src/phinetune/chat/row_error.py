"""What is wrong with one row."""

from __future__ import annotations

from typing import Literal

from phinetune.errors import DataError

Trouble = Literal["form", "roles", "content", "tools", "system", "template", "labels", "untrained", "letters"]


class RowError(DataError):
    """What is wrong with one row; the caller knows where it stands.

    Attributes:
        kind: what it is about; `phinetune data check` groups by it.
    """

    def __init__(self, problem: str, kind: Trouble = "form") -> None:
        super().__init__(problem)
        self.kind: Trouble = kind
