"""Files of torch.save from strangers: plain tensors are read, everything else is refused in a sentence."""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from phinetune.errors import ModelError
from phinetune.exporting.convert import torch_files
from phinetune.exporting.convert.convert import convert
from phinetune.exporting.convert.torch_files import read_state

GOOD = {"up.lora_A": torch.ones(2, 3), "up.lora_B": torch.ones(4, 2)}


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, stream, **options)
    return stream.getvalue()


def rewritten(change: Callable[[str, bytes], bytes | None], kind: int = zipfile.ZIP_STORED, more: int = 0) -> bytes:
    """The good file with other parts: `change` gives a part's new bytes, or None to leave it out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(GOOD))) as old, zipfile.ZipFile(stream, "w", kind) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
        for number in range(more):
            new.writestr(f"more/{number}", b"")
    return stream.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    return rewritten(lambda name, data: pickled if name.endswith("data.pkl") else data)


class Call:
    """Something that unpickling would call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def overlapping() -> bytes:
    """An archive with one part under many names: together they are larger than the file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(4096))
        for number in range(1, 9):
            again = copy.copy(archive.getinfo("archive/data/0"))
            again.filename = f"archive/data/{number}"
            archive.filelist.append(again)
    return stream.getvalue()


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def claims_more(name: str, data: bytes) -> bytes:
    """The tensors of the pickle say a larger size than their storage has."""
    return data.replace(b"K\x02K\x03\x86", b"K\x02K\xff\x86") if name.endswith("data.pkl") else data


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a checkpoint of tensors"),
    "text": (b"lora_A: 1\n" * 20, "not a checkpoint of tensors"),
    "cut archive": (saved(GOOD)[:-200], "not a checkpoint of tensors"),
    "cut in the middle": (saved(GOOD)[:500], "not a checkpoint of tensors"),
    "old form, cut": (saved(GOOD, _use_new_zipfile_serialization=False)[:-20], "not a checkpoint of tensors"),
    "bomb": (
        rewritten(lambda n, d: bytes(9 << 20) if "/data/" in n else d, zipfile.ZIP_DEFLATED),
        "packed or overlap",
    ),
    "packed": (rewritten(lambda _, data: data, zipfile.ZIP_DEFLATED), "packed or overlap"),
    "overlapping": (overlapping(), "packed or overlap"),
    "no pickle": (rewritten(lambda n, d: None if n.endswith("data.pkl") else d), "should have one data.pkl"),
    "a part is missing": (rewritten(lambda n, d: None if n.endswith("data/0") else d), "not a checkpoint of tensors"),
    "a part is short": (rewritten(lambda n, d: d[:4] if n.endswith("data/1") else d), "fewer numbers than its tensors"),
    "code": (saved(Call(os.system, "touch /tmp/never")), "names `(posix|nt) system`"),
    "code, old form": (
        saved(Call(eval, "1"), _use_new_zipfile_serialization=False),
        "names `.* eval`",
    ),
    "a long bytearray": (with_pickle(pickle.dumps(Call(bytearray, 10**12), 2)), "names `.* bytearray`"),
    "another protocol": (with_pickle(pickle.dumps({"a": OrderedDict()}, 4)), "names `STACK_GLOBAL`"),
    "a broken pickle": (with_pickle(b"\x80\x02}q\x00(X\xff\xff\xff\x7fabc"), "not a checkpoint of tensors"),
    "a pickle of nothing": (with_pickle(b""), "not a checkpoint of tensors"),
    "sparse": (saved({"up.lora_A": torch.ones(2, 3).to_sparse()}), "names `torch._utils _rebuild_sparse_tensor`"),
    "quantised": (saved({"up.lora_A": quantized()}), r"names `torch\S* \w*(_rebuild_qtensor|QInt8\w*)`"),
    "meta": (
        saved({"up.lora_A": torch.ones(2, 3, device="meta")}),
        "names `torch._utils _rebuild_meta_tensor",
    ),
    "float8": (saved({"up.lora_A": torch.ones(2).to(torch.float8_e4m3fn)}), "names `torch"),
    "whole numbers": (saved({"up.lora_A": torch.ones(2, 3, dtype=torch.int64)}), "up.lora_A is int64; only floating"),
    "true and false": (saved({"up.lora_A": torch.ones(2, 3, dtype=torch.bool)}), "up.lora_A is bool; only floating"),
    "expanded": (saved({"up.lora_A": torch.ones(1).expand(10**6, 10**6)}), r"the shape \(1000000, 1000000\)"),
    "larger than its storage": (rewritten(claims_more), "not a checkpoint of tensors"),
    "nested": (saved({"state": {"model": GOOD}}), "state is a dict, not a tensor"),
    "keys of numbers": (saved({5: torch.ones(2)}), "5 is no name of a tensor"),
    "keys of nothing": (saved({None: torch.ones(2)}), "None is no name of a tensor"),
    "a text as value": (saved({"up.lora_A": "x"}), "up.lora_A is a str, not a tensor"),
    "a list": (saved([torch.ones(2)]), "holds a list"),
    "a tensor alone": (saved(torch.ones(2)), "holds a Tensor"),
    "a number": (saved(5), "holds a int"),
    "a list inside": (saved({"model_state_dict": [1]}), "holds a list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    data, words = BAD[kind]
    (tmp_path / "lora.pt").write_bytes(data)
    with pytest.raises(ModelError, match=words) as caught:
        convert(tmp_path / "lora.pt", tmp_path / "out", "peft", lora_alpha=8)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"{tmp_path / 'lora.pt'}: ")
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "data",
    [
        saved(GOOD),
        saved(GOOD, _use_new_zipfile_serialization=False),
        saved(OrderedDict(GOOD)),
        saved({"model_state_dict": GOOD}),
        saved({name: torch.nn.Parameter(tensor) for name, tensor in GOOD.items()}),
        saved({name: tensor.to(torch.bfloat16) for name, tensor in GOOD.items()}),
        rewritten(lambda _, data: data),
    ],
    ids=["as today", "before torch 1.6", "ordered", "loralib's examples", "parameters", "bfloat16", "another archive"],
)
def test_plain_tensors_are_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "lora.pt").write_bytes(data)
    state = read_state(tmp_path / "lora.pt")
    assert {name: tensor.float().tolist() for name, tensor in state.items()} == {
        name: tensor.tolist() for name, tensor in GOOD.items()
    }


def test_tensors_that_share_their_numbers_are_read(tmp_path: Path) -> None:
    torch.save({"a.lora_A": GOOD["up.lora_A"], "b.lora_A": GOOD["up.lora_A"]}, tmp_path / "lora.pt")
    assert read_state(tmp_path / "lora.pt").keys() == {"a.lora_A", "b.lora_A"}


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("LARGEST", "bytes; at most 10 are read"),
        ("LARGEST_PICKLE", "at most 10 bytes"),
        ("MOST_PARTS", "parts; at most"),
    ],
)
def test_sizes_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, words: str) -> None:
    (tmp_path / "lora.pt").write_bytes(rewritten(lambda _, data: data, more=10))
    monkeypatch.setattr(torch_files, limit, 10)
    with pytest.raises(ModelError, match=words):
        read_state(tmp_path / "lora.pt")


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    """A file with a hole in it: the bytes are there and take no disk."""
    (tmp_path / "lora.pt").write_bytes(saved(GOOD))
    os.truncate(tmp_path / "lora.pt", torch_files.LARGEST + 1)
    with pytest.raises(ModelError, match="at most 17,179,869,184 are read"):
        read_state(tmp_path / "lora.pt")


def test_an_enormous_storage_of_the_old_form_takes_no_memory(tmp_path: Path) -> None:
    data = saved(GOOD, _use_new_zipfile_serialization=False)
    small, large = b"cpuq\x06K\x06Nt", b"cpuq\x06\x8a\x06" + struct.pack("<q", 10**14)[:6] + b"Nt"
    assert small in data
    (tmp_path / "lora.pt").write_bytes(data.replace(small, large))
    with pytest.raises(ModelError, match="not a checkpoint of tensors"):
        read_state(tmp_path / "lora.pt")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lora.pt")
    with pytest.raises(ModelError, match="not a file"):
        read_state(tmp_path / "lora.pt")
