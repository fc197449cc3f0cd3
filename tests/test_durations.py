"""Numbers as people read them."""

from __future__ import annotations

import pytest

from phinetune.durations import spell_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (3600, "1h 00m"), (7530, "2h 05m")]
)
def test_seconds_are_spelled(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text
