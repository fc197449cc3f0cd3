"""What a manifest notices, and what is noticed without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phinetune.manifest import MANIFEST, damage, has_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save({"state": torch.arange(200.0)}, tmp_path / "optimizer.pt")
    torch.save({"cpu": torch.arange(300)}, tmp_path / "rng_state.pth")
    save_file({"a": torch.ones(30)}, tmp_path / "adapter.safetensors")
    (tmp_path / "state.json").write_text('{"step": 1}')
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "note.txt").write_text("x")
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def test_a_manifest_lists_the_files_of_all_folders_in_it(folder: Path) -> None:
    assert not has_manifest(folder)
    assert damage(folder) == []
    write_manifest(folder)
    assert has_manifest(folder)
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(listed) == sorted(
        ["adapter.safetensors", "inner/note.txt", "optimizer.pt", "rng_state.pth", "state.json"]
    )
    assert listed["inner/note.txt"]["size"] == 1
    assert damage(folder) == []
    (folder / "more.txt").write_text("a file of someone else is no damage")
    assert damage(folder) == []


NAMES = ["adapter.safetensors", "inner/note.txt", "optimizer.pt", "rng_state.pth", "state.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", [flip, cut, empty, Path.unlink])
def test_a_manifest_notices_any_harm_to_any_file(folder: Path, name: str, harm: Callable[[Path], object]) -> None:
    write_manifest(folder)
    harm(folder / name)
    (fault,) = damage(folder)
    assert fault.startswith(f"{name} ")


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.pt", "rng_state.pth", "state.json"])
@pytest.mark.parametrize("harm", [cut, empty, lambda file: file.write_text("[" * 5000)])
def test_without_one_what_can_not_be_read_is_noticed(folder: Path, name: str, harm: Callable[[Path], object]) -> None:
    harm(folder / name)
    (fault,) = damage(folder)
    assert fault.startswith(f"{name} can't be read (")


def test_an_archive_without_a_manifest_is_compared_with_its_own_checksums(folder: Path) -> None:
    flip(folder / "optimizer.pt")
    assert damage(folder) == ["optimizer.pt is damaged (in optimizer/data/0)"]


def test_an_adapter_without_tensors_is_none(folder: Path) -> None:
    save_file({}, folder / "adapter.safetensors")
    assert damage(folder) == ["adapter.safetensors holds no tensor"]


def test_the_first_bit_and_the_last_count(folder: Path) -> None:
    write_manifest(folder)
    for at in (0, -1):
        content = bytearray((folder / "optimizer.pt").read_bytes())
        content[at] ^= 128
        (folder / "optimizer.pt").write_bytes(content)
        assert damage(folder) == ["optimizer.pt is damaged (its SHA-256 is not that of manifest.json)"]
        content[at] ^= 128
        (folder / "optimizer.pt").write_bytes(content)
        assert damage(folder) == []
