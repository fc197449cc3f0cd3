"""Ids of what a server makes, and the time as its API writes it."""

from __future__ import annotations

import secrets
import string
import time

_LETTERS = string.ascii_letters + string.digits


def new_id(kind: str) -> str:
    """A new id such as `file-…` or `ftjob-…`: nobody can guess it, and no file system minds it."""
    return f"{kind}-{''.join(secrets.choice(_LETTERS) for _ in range(24))}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
