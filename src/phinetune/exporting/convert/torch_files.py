"""Reads the tensors of a file that torch.save wrote. Such a file is a pickle, so it is looked through first.

torch's `weights_only` runs no code, but it builds whatever tensors the pickle describes: of any size, sparse or
quantised, or with `bytearray` of any length. Here a pickle may name plain tensors only, and the file is mapped into
memory, so that a tensor can't reach beyond it.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from phinetune.errors import ModelError, at_most, first_line

LARGEST = 16 << 30  # bytes of a file
LARGEST_PICKLE = 16 << 20  # bytes of the part that names the tensors; it has about 200 for each
MOST_PARTS = 100_000
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# All that the pickle of a state dict may name.
NAMES = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("torch FloatStorage", "torch BFloat16Storage", "torch HalfStorage", "torch DoubleStorage"),
    *("torch LongStorage", "torch IntStorage", "torch ByteStorage", "torch BoolStorage"),
}
# Instructions that name something in another way than the files of torch.save do.
OTHER_NAMES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
OLD_PICKLES = 5  # a file from before torch 1.6 begins with as many: a mark, versions, the state, names of storages
REMEDY = "save it again with torch.save(lora.lora_state_dict(model), …)"


def read_state(file: Path) -> Mapping[str, Tensor]:
    """The state dict in a file that `torch.save` wrote: plain tensors of floating point by name.

    Raises:
        ModelError: the file is too large or damaged, or holds something else; the error names what is no such tensor.
    """
    if not file.is_file():
        raise ModelError(f"{file}: not a file")
    try:
        held = _look_through(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch, pickletools and zipfile raise errors of many classes
        raise ModelError(f"{file}: not a checkpoint of tensors that can be read: {first_line(error)}") from None
    if isinstance(state, Mapping):
        state = state.get("model_state_dict", state)  # loralib's own examples save it under this key
    if not isinstance(state, Mapping):
        raise ModelError(f"{file}: holds a {type(state).__name__}, not a state dict of loralib")
    problems = [f"{file}: {name} {why}" for name, tensor in state.items() if (why := _why_unusable(name, tensor))]
    if not problems and _bytes_of(state.values()) > held:
        problems = [f"{file}: damaged: it holds fewer numbers than its tensors have; fetch or write it again"]
    if problems:
        raise ModelError(at_most(problems, 8))
    return state


def _bytes_of(values: Iterable[Tensor]) -> int:
    """The bytes of all tensors' numbers. Tensors that share theirs count once."""
    storages = [value.untyped_storage() for value in values]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _look_through(file: Path) -> int:
    """Look at sizes and names in the file. Nothing of it is built. Returns how many bytes of numbers it may hold.

    Raises:
        ValueError: there is something in it that is not read.
    """
    size = file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes; at most {LARGEST:,} are read")
    if zipfile.is_zipfile(file):
        pickled, held = _read_archive(file, size)
        pickles: IO[bytes] = io.BytesIO(pickled)
        count = 1
    else:
        pickles, count, held = file.open("rb"), OLD_PICKLES, size
    with pickles:
        for name in (name for _ in range(count) for name in _named(pickles)):
            if name not in NAMES:
                raise ValueError(f"it names `{name[:100]}`, and only plain tensors are read; {REMEDY}")
    return held


def _read_archive(file: Path, size: int) -> tuple[bytes, int]:
    """The part of an archive that names its tensors, and the bytes of all parts that hold numbers.

    Raises:
        ValueError: a part is compressed, or the parts together are larger than the file: torch writes neither.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if len(parts) > MOST_PARTS:
            raise ValueError(f"it has {len(parts):,} parts; at most {MOST_PARTS:,} are read")
        packed = next((part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED), None)
        if packed or sum(part.file_size for part in parts) > size:
            raise ValueError(
                f"its parts are packed or overlap ({packed or 'together they are larger than it'}); {REMEDY}"
            )
        found = [part for part in parts if part.filename.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1 or found[0].file_size > LARGEST_PICKLE:
            raise ValueError(f"it should have one data.pkl of at most {LARGEST_PICKLE:,} bytes")
        return archive.read(found[0]), sum(part.file_size for part in parts if "/data/" in part.filename)


def _named(pickled: IO[bytes]) -> Iterator[str]:
    """What the next pickle of a stream names: modules and what is in them."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL":
            yield str(argument)
        elif operation.name in OTHER_NAMES:
            yield operation.name


def _why_unusable(name: object, tensor: object) -> str | None:
    """Why an entry is no plain tensor of floating point with a name; None if it is one."""
    if not isinstance(name, str):
        return "is no name of a tensor"
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.dtype not in FLOATS:
        return f"is {str(tensor.dtype).removeprefix('torch.')}; only floating point is read"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"has the shape {tuple(tensor.shape)}, and the file does not hold as many numbers"
    return None
