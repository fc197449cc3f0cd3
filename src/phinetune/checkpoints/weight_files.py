"""The safetensors files of a checkpoint: which they are, what their headers say, and a fingerprint of their tensors."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from phinetune.checkpoints.small_files import read_json, what_to_do
from phinetune.errors import ModelError, at_most, reason_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HeldTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        dtype: safetensors' name of it (F32, BF16, …).
        start, end: where its bytes lie in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_weights(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files.

    Raises:
        ModelError: the folder has no weights, has only pickled ones, lacks files that the index names, or has two sets
            of weights.
    """
    if (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            raise ModelError(
                f"{folder}: there are {WEIGHTS} and {INDEX}, two sets of weights; delete the one that is not meant"
            )
        return _indexed_files(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: the weights are pickled ({pickles[0]}), and unpickling can run any code; convert them to "
            "safetensors first, for example with transformers' save_pretrained"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"; there is {others[0]}, which no index names" if others else ""
    raise ModelError(f"{folder}: no weights there (expected {WEIGHTS} or {INDEX}{found})")


def _indexed_files(folder: Path) -> list[Path]:
    names = sorted(set(_weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: {', '.join(at_most(missing, 8))}"
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> Mapping[str, str]:
    """The name of the file of each tensor, by the index."""
    tree = read_json(folder / INDEX).get("weight_map")
    if not isinstance(tree, dict) or not tree or not all(isinstance(name, str) for name in tree.values()):
        raise ModelError(f"{folder / INDEX}: `weight_map` must name the file of each tensor; fetch or write it again")
    outside = sorted({name for name in tree.values() if name in ("", "..") or Path(name).name != name})
    if outside:
        raise ModelError(f"{folder / INDEX}: {', '.join(at_most(outside, 8))}: not the name of a file beside the index")
    return tree


def held_tensors(folder: Path) -> dict[str, HeldTensor]:
    """All tensors of a checkpoint by name. Of its files only the headers are read.

    Raises:
        ModelError: files are missing or damaged, two files hold the same tensor, or a file lacks one that the index
            names.
    """
    held: dict[str, HeldTensor] = {}
    problems = []
    for file in check_weights(folder):
        for name, tensor in read_header(file).items():
            if name in held:
                problems.append(f"{name}: it is in {held[name].file.name} and in {file.name}; only one can be meant")
            held[name] = tensor
    if (folder / INDEX).is_file():
        problems += [
            f"{name}: the index names {file} for it, and it is not there"
            for name, file in _weight_map(folder).items()
            if name not in held or held[name].file.name != file
        ]
    if problems:
        raise ModelError([f"{folder}: the index and the weight files don't fit together:", *at_most(problems, 8)])
    return held


def read_header(file: Path) -> dict[str, HeldTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        ModelError: the file is damaged or cut off.
    """
    try:
        with safe_open(file, framework="pt"):  # checks every entry, and that they fill the file to its last byte
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except Exception as error:  # safetensors raises errors of many classes
        raise ModelError(f"{file}: damaged ({reason_of(error)}); {what_to_do(file)}") from error
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = {
        name: HeldTensor(file, e["dtype"], tuple(e["shape"]), *(begin + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def fingerprint(folder: Path) -> str:
    """SHA-256 over name, dtype, shape and first 4 KiB of every tensor in the folder's safetensors files.

    That is only a few MB of any checkpoint. If a model is trained further, these bytes change.

    Raises:
        ModelError: a file is damaged.
    """
    total = hashlib.sha256()
    for file in check_weights(folder):
        tensors = read_header(file)
        with file.open("rb") as stream:
            for name, tensor in sorted(tensors.items()):
                stream.seek(tensor.start)
                total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                total.update(stream.read(min(4096, tensor.end - tensor.start)))
    return total.hexdigest()
