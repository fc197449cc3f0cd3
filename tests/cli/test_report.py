"""`phinetune report` and `watch`: what they write, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.cli_helpers import run
from reporting.report_helpers import make_run


def test_one_run_gets_its_page_each_time_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run")
    for _ in range(2):
        assert run(monkeypatch, "report", folder) == 0
    out = capsys.readouterr().out
    assert f"Wrote {folder / 'report.html'}" in out
    assert f"Next: phinetune watch {folder}" in out


def test_several_runs_are_compared_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "report", *runs) == 0
    assert "2 runs compared" in Path("comparison.html").read_text()
    Path("comparison.html").write_text("mine")
    assert run(monkeypatch, "report", *runs) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path("comparison.html").read_text() == "mine"
    assert run(monkeypatch, "report", *runs, "--out", "more.html") == 0
    assert run(monkeypatch, "report", *runs, "--overwrite") == 0
    assert Path("comparison.html").read_text() != "mine"


def test_mistakes_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "report", tmp_path / "nowhere") == 2
    assert run(monkeypatch, "report", make_run(tmp_path / "run"), "--out", tmp_path) == 2
    assert run(monkeypatch, "watch", tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)
