"""The errors that a user can correct. Each is a `PhinetuneError` and says in sentences what is wrong."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

# The last one is what oneDNN says of any product that it has no memory for.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "could not create a primitive")
# The exit status where the same call may do when the machine has more memory or disk: EX_OSERR of sysexits.h.
MACHINE_FAULT = 71


class PhinetuneError(Exception):
    """A mistake that the user can correct. It holds all problems that were found, so that all are shown at once.

    The command line prints `str(error)` and exits with status 2, or `MACHINE_FAULT` where
    `phinetune.files.is_machine_fault` says so. A caller in Python may read `problems`.
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


class MachineError(RunError):
    """Memory ran out, or a disk is full or failed. Nothing has to be mended in what the user gave."""


class LostProcess(RunError):
    """Another process of the run is gone, so this one can't go on. It is never the cause of what happened."""


# What gloo says in a plain RuntimeError when processes can't exchange any more.
LOST = ("connection closed by peer", "connection reset by peer", "gloo", "broken pipe")


LOST_PROCESS = (
    "another process of this run is gone, so this one can't go on; its own message says why. Checkpoints written "
    "before are whole, and --resume goes on from them"
)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    if isinstance(error, LostProcess) or any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in LOST)


Trouble = Literal[
    "form",
    "roles",
    "content",
    "tools",
    "system",
    "template",
    "labels",
    "untrained",
    "letters",
    "prompts",
    "equal_answers",
    "response",
]


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


@contextmanager
def told_as(kind: type[PhinetuneError], where: str) -> Iterator[None]:
    """A context for one call of a library with something that the user gave: what it raises becomes one sentence.

    Libraries raise errors of any class for a bad value or a damaged file. Nothing but the library's call belongs into
    the context, so that a fault of this package stays a traceback.

    Args:
        where: what the sentence begins with: the file, the key or the model.
    """
    try:
        yield
    except (PhinetuneError, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{where}: {reason_of(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a device, whichever library raised it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def reason_of(error: BaseException, longest: int = 300) -> str:
    """What an error says, in one line of at most `longest` letters; its class if it says nothing."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= longest else f"{text[:longest]} …"


def first_line(error: BaseException) -> str:
    """The first line of what an error says. Some libraries add paragraphs of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
