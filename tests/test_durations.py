"""Durations as people read and write them."""

from __future__ import annotations

import pytest

from phinetune.durations import read_seconds, spell_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (3600, "1h 00m"), (7530, "2h 05m")]
)
def test_seconds_are_spelled(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h30m", 9000),
        ("45m", 2700),
        ("90s", 90),
        ("1d 6h", 108_000),
        ("1.5H", 5400),
        ("0:20:05", 1205),
        ("1-12:00:00", 129_600),
        ("2h 05m", 7500),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert read_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "2h30", "3600", "-5m", "30m2h", "soon", "1:2:3", "nan", "infs"])
def test_what_is_no_duration_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no duration; write it as 2h30m"):
        read_seconds(text)
