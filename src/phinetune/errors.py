"""The errors that a user can correct. Each is a `PhinetuneError` and says in sentences what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal


class PhinetuneError(Exception):
    """A mistake that the user can correct. It holds all problems that were found, so that all are shown at once.

    The command line prints `str(error)` and exits with status 2. A caller in Python may read `problems`.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(PhinetuneError):
    """A key, a value or a combination in the configuration is wrong."""


class DataError(PhinetuneError):
    """A data file, or a row in it, can't be used."""


class ModelError(PhinetuneError):
    """A checkpoint, a tokenizer or an adapter can't be used as the user asked."""


class RunError(PhinetuneError):
    """A run's folder can't be used, or a run can't go on."""


Trouble = Literal["form", "roles", "content", "tools", "system", "template", "labels", "untrained", "letters"]


class RowError(DataError):
    """Says what is wrong with one row. The caller knows which row it is.

    Attributes:
        kind: what the problem is about. `phinetune data check` groups findings by it.
    """

    def __init__(self, problem: str, kind: Trouble = "form") -> None:
        super().__init__(problem)
        self.kind: Trouble = kind


def unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist. It names the nearest key that does, if one is near."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"{where}: there is no key `{key}`{hint}"


def at_most(problems: Sequence[str], shown: int = 20) -> list[str]:
    """The first `shown` problems, and a line that says how many more there are."""
    rest = len(problems) - shown
    return list(problems) if rest <= 0 else [*problems[:shown], f"… and {rest} more of this kind"]
