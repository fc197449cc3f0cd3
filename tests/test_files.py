"""Atomic writing: a failure leaves what was there before."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from phinetune.files import is_disk_full, publish_files, staged_folder, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_text_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert names(tmp_path) == {"a.txt"}


def test_text_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "two\ud800")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert names(tmp_path) == {"a.txt"}


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "made") as stage:
        (stage / "x").write_text("1")
        assert not (tmp_path / "made").exists()
    assert names(tmp_path) == {"made"}
    assert names(tmp_path / "made") == {"x"}


def test_a_staged_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with staged_folder(tmp_path / "made") as stage:
            (stage / "x").write_text("1")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fill()
    assert names(tmp_path) == set()


def test_nothing_is_seen_of_a_folder_before_its_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def power_cut(stage: Path, target: Path) -> None:
        assert (stage / "x").read_text() == "1"
        assert not target.exists()
        raise OSError("power")

    monkeypatch.setattr("phinetune.files.os.replace", power_cut)
    with pytest.raises(OSError, match="power"), staged_folder(tmp_path / "made") as stage:
        (stage / "x").write_text("1")
    assert names(tmp_path) == set()


def test_published_files_replace_their_namesakes_only(tmp_path: Path) -> None:
    stage, target = tmp_path / "stage", tmp_path / "target"
    stage.mkdir()
    target.mkdir()
    (stage / "a").write_text("new")
    (target / "a").write_text("old")
    (target / "b").write_text("kept")
    publish_files(stage, target)
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a": "new", "b": "kept"}


def test_a_full_disk_is_recognised_through_its_wrappers() -> None:
    wrapped = RuntimeError("zip writer failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(wrapped)
    assert not is_disk_full(RuntimeError("something else"))
    assert not is_disk_full(None)
