"""What a probe's clock counts."""

from __future__ import annotations

import pytest

from phinetune.planning import probe


@pytest.mark.parametrize(("first", "later", "rounds"), [(90.0, 0.25, 1 + probe.ROUNDS), (0.25, 2 * probe.LONG, 2)])
def test_the_first_round_is_never_counted(
    monkeypatch: pytest.MonkeyPatch, first: float, later: float, rounds: int
) -> None:
    """A fresh machine compiles the kernels in it. A plan of two hours came of that, where 12 minutes were due."""
    now, worked = [0.0], [0]

    def work() -> None:
        now[0] += later if worked[0] else first
        worked[0] += 1

    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    assert probe._seconds(work) == later
    assert worked[0] == rounds
