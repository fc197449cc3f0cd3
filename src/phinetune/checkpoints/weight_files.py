"""The safetensors files of a checkpoint: which they are, what their headers say, and a fingerprint of their tensors."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from phinetune.checkpoints.small_files import read_json, what_to_do
from phinetune.errors import ModelError, at_most, reason_of, told_as

# The dtypes that weights and adapters may have, by safetensors' names.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
LARGEST_HEADER = 16 << 20  # bytes; a header of a thousand tensors has about a hundred thousand
LONGEST_NAME = 500  # letters of a tensor's name
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
        begin, header = _read_entries(file)
    except Exception as error:  # safetensors raises errors of many classes
        raise ModelError(f"{file}: damaged ({reason_of(error)}); {what_to_do(file)}") from error
    header.pop("__metadata__", None)
    tensors = {
        name: HeldTensor(file, e["dtype"], tuple(e["shape"]), *(begin + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _read_entries(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the bytes of the tensors begin, and the entries of a header. The length is checked before it is read."""
    with file.open("rb") as stream:
        start = stream.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
        if length > LARGEST_HEADER:
            raise ValueError(f"its header would have {length:,} bytes; at most {LARGEST_HEADER:,} are read")
        with safe_open(file, framework="pt"):  # checks every entry, and that they fill the file to its last byte
            pass
        header: dict[str, Any] = json.loads(stream.read(length), object_pairs_hook=_each_once)
    too_long = next((name for name in header if len(name) > LONGEST_NAME), None)
    if too_long:
        raise ValueError(f"the name of a tensor has {len(too_long):,} letters: {too_long[:40]} …")
    return 8 + length, header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header. safetensors itself takes the last of two entries with one name."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if any(name == other for other, _ in pairs[:i]))
        raise ValueError(f"`{twice[:LONGEST_NAME]}` is there twice")
    return entries


def unreadable_dtypes(tensors: Mapping[str, HeldTensor]) -> list[str]:
    """A problem for each tensor whose dtype is not in `DTYPES`."""
    return [
        f"{name} is {held.dtype}; weights of {', '.join(DTYPES)} can be read"
        for name, held in tensors.items()
        if held.dtype not in DTYPES
    ]


def read_tensor(held: HeldTensor, name: str) -> Tensor:
    """One tensor, on the CPU. The file is closed again, so that no more of it stays in memory.

    Raises:
        ModelError: the file has changed since its header was read.
    """
    with told_as(ModelError, f"{held.file}: damaged"), safe_open(held.file, framework="pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
    return tensor


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        ModelError: the file is damaged, or has a dtype that is not in `DTYPES`; the error names the tensors.
    """
    header = read_header(file)
    problems = unreadable_dtypes(header)
    if problems:
        raise ModelError([f"{file}: {problem}" for problem in at_most(problems, 8)])
    with told_as(ModelError, f"{file}: damaged"), safe_open(file, framework="pt") as stream:
        return {name: stream.get_tensor(name) for name in header}


def lazy_tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The checkpoint's tensors. Each is read when it is asked for, and its memory is freed together with it.

    transformers itself maps the files into memory. Then the pages of tensors that are quantised already stay in memory
    until the last tensor is loaded. In the end that is the whole checkpoint in 16 bits.

    Args:
        files: closes the files when it is left.
    """
    tensors: dict[str, Any] = {}
    for file in check_weights(folder):
        opened = files.enter_context(safe_open(file, framework="pt", backend="pread"))
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is not a mapping)
    return tensors


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
