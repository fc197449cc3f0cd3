"""Writes durations for a person to read, and reads those that a person wrote."""

from __future__ import annotations

import math
import re

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # as schedulers write it: 1-12:00:00


def spell_seconds(seconds: float) -> str:
    """A number of seconds as text: `45s`, `3m 20s` or `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def read_seconds(text: str) -> float:
    """The seconds of a duration such as `2h30m`, `45m`, `1d 6h`, `90s`, or `1-12:00:00` as schedulers write it.

    Raises:
        ValueError: the text is no duration, or one of no length.
    """
    bare = "".join(text.lower().split())
    found = CLOCK.fullmatch(bare) or PARTS.fullmatch(bare)
    parts = zip(UNITS.values(), found.groups(), strict=True) if found else ()
    seconds = sum(unit * float(part) for unit, part in parts if part)
    if not 0 < seconds < math.inf:
        raise ValueError(f"`{text}` is no duration; write it as 2h30m, 45m or 90s")
    return seconds
