"""The files of weights that a checkpoint names are there, whole and its own; what is not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phinetune.checkpoints.weight_files import check_weights, fingerprint, held_tensors
from phinetune.errors import ModelError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The tiny model in two files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {FIRST: names[:6], SECOND: names[6:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in halves.items() for name in part})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        held_tensors(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "start",
    [b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{x"],
    ids=["empty", "huge header", "header is a list", "header is no JSON"],
)
def test_a_damaged_file_of_weights_is_named(folder: Path, start: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(start)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged .*; fetch or write it again"):
        fingerprint(folder)


def test_the_fingerprint_changes_with_any_tensor(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint(folder) != before


def test_headers_of_all_files_are_read(sharded: Path) -> None:
    held = held_tensors(sharded)
    assert held["lm_head.weight"].shape == (300, 32)
    assert {tensor.file.name for tensor in held.values()} == {FIRST, SECOND}
    assert fingerprint(sharded)


def test_a_file_that_is_cut_off_anywhere_is_damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "model.safetensors: damaged" in refusal(folder), length
    file.write_bytes(whole + b"more")
    assert "model.safetensors: damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer.* `git lfs pull`"),
        (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
        (b"<html></html>", "it is a web page"),
        (b"", "it is empty"),
    ],
)
def test_what_a_damaged_file_is_instead_is_said(folder: Path, start: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(start)
    with pytest.raises(ModelError, match=words):
        held_tensors(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data_offsets", [0, 10**9]), ("data_offsets", None), ("dtype", "F3"), ("shape", [-1]), ("shape", [10**9])],
)
def test_a_header_that_lies_is_damaged(folder: Path, key: str, value: Any) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"][key] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "model.safetensors: damaged" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 5}, {"a": None}, "x"])
def test_an_index_without_its_map_is_refused(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    assert "`weight_map` must name the file of each tensor" in refusal(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_names_files_beside_it_alone(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name, "b": FIRST})
    assert "not the name of a file beside the index" in refusal(sharded)


def test_an_index_and_its_files_fit_together(sharded: Path) -> None:
    tensors = load_file(sharded / SECOND)
    save_file({**tensors, "lm_head.weight": torch.zeros(300, 32)}, sharded / SECOND)
    assert f"lm_head.weight: it is in {FIRST} and in {SECOND}" in refusal(sharded)
    tensors.pop("model.norm.weight")
    save_file(tensors, sharded / SECOND)
    assert f"model.norm.weight: the index names {SECOND} for it, and it is not there" in refusal(sharded)


def test_an_index_that_names_the_other_file_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(sharded, {**index, "lm_head.weight": SECOND})
    assert f"lm_head.weight: the index names {SECOND} for it" in refusal(sharded)


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    """transformers would read the one, and the index names the other."""
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    assert "two sets of weights" in refusal(sharded)


def test_files_that_no_index_names_are_told(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=f"no weights there .*; there is {FIRST}, which no index names"):
        check_weights(sharded)
