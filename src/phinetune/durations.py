"""Writes durations for a person to read."""

from __future__ import annotations


def spell_seconds(seconds: float) -> str:
    """A number of seconds as text: `45s`, `3m 20s` or `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
