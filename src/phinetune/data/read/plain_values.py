"""Values of data objects as JSON has them, and any value as the text that stands for it in a prompt or an answer."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

AS_THEY_ARE = (str, int, bool, float, type(None))
MISSING = ("NAType", "NaTType")  # pandas' own; NaT counts as a date, so it is asked by its name
WRITTEN, AS_JSON = "written", "as_json"  # what `as_text` did with a value that is no text


def plain(value: Any) -> Any:
    """A value as JSON has it: lists, dictionaries, texts, numbers, booleans and None.

    Dates become ISO texts, arrays and scalars of NumPy Python's own, pandas' missing values None. What has no such form
    is returned as it is.
    """
    kind = type(value)
    if kind in AS_THEY_ARE:
        return value
    if kind.__name__ in MISSING:
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (datetime.date, datetime.time)):
        return date_text(value)
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars, torch's tensors
        listed = value.tolist()
        return listed if type(listed) in AS_THEY_ARE else plain(listed) if listed is not value else value
    return value


def date_text(value: datetime.date | datetime.time) -> str:
    """A date, or a date with its time, in ISO's form. A date whose time is midnight is a date."""
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None and value.time() == datetime.time():
            return value.date().isoformat()
        return value.isoformat(" ")
    return value.isoformat()


def is_missing(value: Any) -> bool:
    """Whether a value is null, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ in MISSING


def as_text(value: Any) -> tuple[str, str | None]:
    """The text of a value, and `WRITTEN` or `AS_JSON` if it was none.

    A null is an empty text, 3 is `3`, true is `true`, a date has ISO's form, a list or an object is JSON.

    Raises:
        ValueError: the value can't be written, as an image.
    """
    if isinstance(value, str):
        return value, None
    if is_missing(value):
        return "", None
    made = plain(value)
    if isinstance(made, str):
        return made, WRITTEN
    if isinstance(made, (bool, int, float)):
        return json.dumps(made), WRITTEN
    try:
        return json.dumps(made, ensure_ascii=False), AS_JSON
    except (TypeError, ValueError):
        raise ValueError(f"holds a {type(value).__name__}, which is no text") from None


def jsonable(value: Any) -> str:
    """What JSON has no form for, as text: for `json.dumps(…, default=jsonable)`."""
    made = plain(value)
    return made if isinstance(made, str) else str(made)
