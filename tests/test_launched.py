"""What a process knows of its launcher, and what it reports to ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune import launched
from phinetune.errors import ConfigError, LostProcess


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", launched.REPORTS, launched.LAUNCHER):
        monkeypatch.delenv(name, raising=False)


def test_a_process_knows_who_started_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (launched.rank(), launched.has_launcher(), launched.is_ours()) == (0, False, False)
    monkeypatch.setenv(launched.REPORTS, str(tmp_path))  # left in the environment of a program that one of ours started
    assert not launched.is_ours()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (launched.rank(), launched.has_launcher(), launched.is_ours()) == (3, True, True)
    monkeypatch.setenv(launched.LAUNCHER, "1")  # not this process's parent
    if launched.sys.platform.startswith("linux"):
        with pytest.raises(SystemExit):
            launched.follow_launcher()


def test_what_processes_report_is_read_by_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(launched.REPORTS, str(tmp_path))
    for rank, problems, error in (
        ("1", ["a", "b"], ConfigError(["a", "b"])),
        ("0", ["gone"], LostProcess("gone")),
        ("2", [], ValueError("no number")),
    ):
        monkeypatch.setenv("RANK", rank)
        launched.report(2, problems, error=error)
    found = launched.read_reports(tmp_path)
    assert list(found) == [0, 1, 2]
    assert (list(found[1].problems), found[1].trace, found[1].lost) == (["a", "b"], "", False)
    assert found[0].lost
    assert "ValueError: no number" in found[2].trace
