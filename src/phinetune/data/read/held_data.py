"""Data that a Python program holds, for as long as a verb works on it, under the name that stands in its configuration.

A configuration names files. A data frame, a list or a function gets a name, too: what it is, and the SHA-256 of its
content. All rooms below pass this text about, and only here is it looked up. `holding` opens the time in which a name
means something; afterwards nothing is kept alive.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from phinetune.data.read.data_objects import HeldRows
from phinetune.errors import DataError

DIGITS = 16  # of a SHA-256 that stand in a name
_NAME = re.compile(rf".+ \(sha256 [0-9a-f]{{{DIGITS}}}\)", re.DOTALL)

_rows: dict[str, HeldRows] = {}
_functions: dict[str, Callable[..., Any]] = {}


@contextmanager
def holding() -> Iterator[None]:
    """A context: what is held in it is given back at its end."""
    before = dict(_rows), dict(_functions)
    try:
        yield
    finally:
        for now, then in zip((_rows, _functions), before, strict=True):
            now.clear()  # type: ignore[attr-defined]
            now.update(then)  # type: ignore[attr-defined]


def hold_rows(held: HeldRows) -> str:
    """Hold rows; the name under which they are found."""
    name = f"{held.title} (sha256 {held.digest[:DIGITS]})"
    _rows.setdefault(name, held)
    return name


def held_rows(source: str) -> HeldRows | None:
    """The rows that are held under a name; None if the source is none that is held now."""
    return _rows.get(source)


def is_held_name(source: str) -> bool:
    """Whether a source is named as what a Python program held, now or when a configuration was written."""
    return source in _rows or _NAME.fullmatch(source) is not None


def why_gone(source: str) -> str:
    """The sentence for rows that some program held and that are not held now."""
    return (
        f"{source}: these rows were in a Python program's memory, and no file holds them; give the same data again "
        "from Python: train(…, data=…, resume=True), or evaluate(…, data=…)"
    )


def hold_function(function: Callable[..., Any]) -> str:
    """Hold the function that makes a row; the name under which it is found, with the digest of its source."""
    name = f"function {function_title(function)} (sha256 {function_digest(function)[:DIGITS]})"
    _functions[name] = function
    return name


def held_function(name: str) -> Callable[..., Any]:
    """The function of a name.

    Raises:
        DataError: no program holds it now.
    """
    if name not in _functions:
        raise DataError(
            f"data.row: {name}: the function that makes the rows is given in Python, as train(data={{…, 'row': "
            "make_row}) or evaluate(…, row=make_row); in a file, name data.columns or data.prompt and data.completion"
        )
    return _functions[name]


def function_title(function: Callable[..., Any]) -> str:
    """How messages call a function."""
    return str(getattr(function, "__qualname__", type(function).__name__)).replace("<locals>.", "")


def function_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of a function's source, or of its code where there is no source, as in a shell.

    What it takes from elsewhere is not looked at. The rows that it makes are recorded as well.
    """
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = f"{code.co_code.hex()} {code.co_consts!r}" if code else repr(type(function))
    return hashlib.sha256(text.encode()).hexdigest()
