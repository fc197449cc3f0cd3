"""Atomic writing: a failure leaves what was there before."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from phinetune.errors import MachineError, ModelError
from phinetune.files import (
    disk_trouble,
    file_digest,
    is_machine_fault,
    publish_files,
    publish_folder,
    remove,
    staged_folder,
    write_text,
)


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
    assert disk_trouble(wrapped) == "no space is left"
    assert disk_trouble(RuntimeError("write failed: No space left on device")) == "no space is left"
    assert disk_trouble(RuntimeError("something else")) is None
    assert disk_trouble(None) is None


@pytest.mark.parametrize("there", ["folder", "file", "link", "dangling link", "nothing"])
def test_whatever_is_in_the_place_of_a_folder_is_replaced_and_what_a_link_points_to_stays(
    tmp_path: Path, there: str
) -> None:
    stage, target, other = tmp_path / "stage", tmp_path / "target", tmp_path / "other"
    for folder in (stage, other):
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    if there == "folder":
        target.mkdir()
        (target / "y").write_text("old")
    elif there == "file":
        target.write_text("old")
    elif there == "link":
        target.symlink_to(other)
    elif there == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    publish_folder(stage, target)
    assert names(target) == {"x"}
    assert not target.is_symlink()
    assert (other / "x").read_text() == "other"
    assert names(tmp_path) == {"target", "other"}


def test_processes_that_publish_to_one_place_at_once_all_succeed(tmp_path: Path) -> None:
    children = []
    for number in range(5):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(20):
                    with staged_folder(tmp_path / "made") as stage:
                        (stage / "x").write_text(f"{number} {turn}")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    assert names(tmp_path) == {"made"}
    assert (tmp_path / "made" / "x").read_text().endswith(" 19")


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to a folder", "dangling link", "nothing"])
def test_what_is_removed_is_gone_and_what_it_points_to_stays(tmp_path: Path, kind: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("")
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("")
    elif kind == "folder":
        (place / "in it").mkdir(parents=True)
    elif kind != "nothing":
        targets = {"link to a file": "kept/x", "link to a folder": "kept", "dangling link": "nowhere"}
        place.symlink_to(tmp_path / targets[kind])
    remove(place)
    assert not os.path.lexists(place)
    assert (tmp_path / "kept" / "x").is_file()


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one piece
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_private_is_for_the_user_alone_until_they_share_it(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return path.stat().st_mode & 0o777

    before = os.umask(0o022)
    try:
        write_text(tmp_path / "mine", "one", private=True)
        write_text(tmp_path / "ours", "one")
        assert (mode(tmp_path / "mine"), mode(tmp_path / "ours")) == (0o600, 0o644)
        (tmp_path / "mine").chmod(0o640)
        write_text(tmp_path / "mine", "two", private=True)
        assert mode(tmp_path / "mine") == 0o640
        for private, wanted in ((True, 0o700), (False, 0o755)):
            with staged_folder(tmp_path / "folder", private=private) as stage:
                assert mode(stage) == wanted
            assert mode(tmp_path / "folder") == wanted
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("cause", "is_one"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (MachineError("no space is left"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_what_the_machine_refused_is_known_behind_a_sentence(cause: Exception, is_one: bool) -> None:
    with pytest.raises(ModelError) as caught:
        raise ModelError("the file can't be read") from cause
    assert (is_machine_fault(caught.value), is_machine_fault(cause)) == (is_one, is_one)
