"""Spoiled safetensors headers and weight indexes: each is refused in one sentence, and no memory is taken for it."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.small_files import LARGEST, read_json
from phinetune.checkpoints.weight_files import (
    INDEX,
    LARGEST_HEADER,
    LONGEST_NAME,
    held_tensors,
    lazy_tensors,
    read_header,
    read_tensor,
    read_tensors,
)
from phinetune.config.model import ModelSection
from phinetune.errors import ModelError

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def pack(header: Any, data: bytes = bytes(16)) -> bytes:
    """A safetensors file with this header: a tree, or its text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(**changes: Any) -> bytes:
    return pack({"a": A, "b": {**B, **changes}})


def without(key: str) -> bytes:
    return pack({"a": A, "b": {name: value for name, value in B.items() if name != key}})


SPOILED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "a header of 0 bytes": bytes(8),
    "a header of 20 GB": struct.pack("<Q", 20 << 30) + b"{}",
    "the largest length": b"\xff" * 8 + b"{}",
    "a length past the end": struct.pack("<Q", 100) + b"{}",
    "a length within the header": struct.pack("<Q", 10) + pack({"a": A, "b": B})[8:],
    "offsets overlap": changed(data_offsets=[4, 12]),
    "two tensors in one place": pack({"a": A, "b": A}, bytes(8)),
    "offsets run backwards": changed(data_offsets=[16, 8]),
    "offsets past the end": changed(data_offsets=[8, 10**12], shape=[(10**12 - 8) // 4]),
    "negative offsets": changed(data_offsets=[-8, 0]),
    "three offsets": changed(data_offsets=[8, 12, 16]),
    "offsets are texts": changed(data_offsets=["8", "16"]),
    "a gap": pack({"a": A, "b": {**B, "data_offsets": [12, 20]}}, bytes(20)),
    "bytes after the last tensor": pack({"a": A, "b": B}, bytes(17)),
    "bytes are missing": pack({"a": A, "b": B}, bytes(15)),
    "no dtype": without("dtype"),
    "no shape": without("shape"),
    "no offsets": without("data_offsets"),
    "an unknown dtype": changed(dtype="F31"),
    "dtype is a number": changed(dtype=32),
    "dtype and bytes differ": changed(dtype="F64"),
    "a negative shape": changed(shape=[-2]),
    "a shape of fractions": changed(shape=[2.0]),
    "a shape of NaN": pack('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)),
    "shape and bytes differ": changed(shape=[3]),
    "a shape that overflows": changed(shape=[2**63, 2]),
    "a tensor is null": pack({"a": A, "b": None}),
    "a tensor is a list": pack({"a": A, "b": [8, 16]}),
    "a tensor twice": pack(f'{{"a": {json.dumps(A)}, "b": {json.dumps(B)}, "a": {json.dumps(A)}}}'),
    "a key twice": pack('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "a name of 501 letters": pack({"a" * (LONGEST_NAME + 1): A}, bytes(8)),
    "a name that is no text": pack(f"{{1: {json.dumps(A)}}}", bytes(8)),
    "a name with half a letter": pack('{"\\ud800": ' + json.dumps(A) + "}", bytes(8)),
    "metadata of numbers": pack({"__metadata__": {"format": 1}, "a": A, "b": B}),
    "metadata is a list": pack({"__metadata__": [], "a": A, "b": B}),
    "deep JSON": pack('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a list": pack([A, B]),
    "null": pack("null"),
    "no UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "zeros": bytes(4096),
}


def test_the_file_that_the_others_are_made_of_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(pack({"a": A, "b": B}))
    assert {name: held.shape for name, held in read_header(tmp_path / "x.safetensors").items()} == {
        "a": (2,),
        "b": (2,),
    }
    assert read_tensors(tmp_path / "x.safetensors")["b"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_header_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(SPOILED[kind])
    for read in (read_header, read_tensors):
        with pytest.raises(ModelError, match=r"model\.safetensors: damaged \(.+\); ") as caught:
            read(file)
        assert len(caught.value.problems) == 1
        assert len(str(caught.value)) < 700
        assert "\n" not in str(caught.value)


def test_a_large_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """The file really has the bytes, as a file with a hole in it."""
    file = tmp_path / "model.safetensors"
    for length in (20 << 30, LARGEST_HEADER + 1):
        file.write_bytes(struct.pack("<Q", length))
        os.truncate(file, 8 + length)
        tracemalloc.start()
        with pytest.raises(ModelError, match=f"its header would have {length:,} bytes"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_only_floating_point_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors: a is \w+; weights of F32, BF16, F16, F64 can be read$"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_file_that_changes_under_the_reader_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    held = read_header(file)["a"]
    assert read_tensor(held, "a").tolist() == [0.0, 0.0]
    save_file({"b": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"x\.safetensors: damaged: .*a"):
        read_tensor(held, "a")


def test_lazy_tensors_are_read_when_asked_for(folder: Path) -> None:
    with ExitStack() as files:
        assert lazy_tensors(folder, files)["model.norm.weight"][:].shape == (32,)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "true", "[" * 100_000, "1" * 5000, '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(text)
    for read in (held_tensors, lambda place: load_base(ModelSection(path=str(place)))):
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: ") as caught:
            read(folder)
        assert len(caught.value.problems) == 1


def test_json_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    os.truncate(file, LARGEST + 1)
    with pytest.raises(ModelError, match=r"config\.json: 67,108,865 bytes; at most 67,108,864 are read"):
        read_json(file)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: os.symlink("/dev/zero", file)])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json: it is not a file"):
        read_json(tmp_path / "config.json")
