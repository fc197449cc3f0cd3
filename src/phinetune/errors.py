"""What goes wrong for a user, said in sentences: every such error is a `PhinetuneError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PhinetuneError(Exception):
    """A mistake the user can mend. Holds every problem found, so that all are told at once.

    The command line prints `str(error)` and exits with status 2; a library caller may read `problems`.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(PhinetuneError):
    """A key, a value or a combination in the configuration."""


class DataError(PhinetuneError):
    """A data file or a row in it."""


class ModelError(PhinetuneError):
    """A checkpoint, a tokenizer or an adapter that can't be used as asked."""


class RunError(PhinetuneError):
    """A run folder, or a run that can't go on."""


def unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"{where}: there is no key `{key}`{hint}"


def at_most(problems: Sequence[str], shown: int = 20) -> list[str]:
    """The first `shown` problems, and a line that counts the rest."""
    rest = len(problems) - shown
    return list(problems) if rest <= 0 else [*problems[:shown], f"… and {rest} more of this kind"]
