"""Numbers in the types of a GGUF: by the gguf package where it can, else by ggml's own quantiser inside xllamacpp."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from phinetune.errors import ModelError

BY_GGML = (Type.Q4_K, Type.Q5_K, Type.Q6_K)  # the gguf package reads these and doesn't write them
INSTALL = "pip install 'phinetune[llamacpp]'"


def quantised(numbers: NDArray[Any], kind: Type, name: str) -> NDArray[Any]:
    """float32 numbers (rows, columns) in the type `kind`; bytes (rows, bytes a row) where numpy has no such type.

    Args:
        name: the tensor's name, for the error message.

    Raises:
        ModelError: a number is not finite or too large for the type, or no quantiser for the type is installed.
    """
    if gguf.GGML_QUANT_SIZES[kind][0] > 1 and not np.isfinite(numbers).all():
        raise ModelError(f"{name}: it holds values that are not finite, and {kind.name} has none of these")
    if kind in BY_GGML:
        data = _by_ggml(np.ascontiguousarray(numbers, dtype=np.float32), kind)
    else:
        with np.errstate(over="ignore"):
            data = gguf.quantize(numbers, kind)
    if kind == Type.F16 and not np.isfinite(data).all():
        raise ModelError(f"{name}: it holds values that are too large for float16; export with --type bf16")
    return data


def check_quantiser(kinds: set[Type]) -> None:
    """Make sure that each of these types can be written.

    Raises:
        ModelError: ggml's quantiser is not installed, or this build of it can't be called.
    """
    if kinds & set(BY_GGML):
        _ggml()


@cache
def _ggml() -> ctypes.CDLL:
    """ggml in xllamacpp's library, with the signatures of ggml.h."""
    found = find_spec("xllamacpp")
    folder = Path(found.origin).parent if found and found.origin else None
    libraries = [file for end in ("so", "pyd", "dylib") for file in folder.glob(f"xllamacpp*.{end}")] if folder else []
    if not libraries:
        raise ModelError(f"the types q4_k_m, q5_k_m, q6_k and q4_0 need ggml's quantiser: {INSTALL}")
    try:
        ggml = ctypes.CDLL(str(libraries[0]))
        ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        ggml.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,  # type
            ctypes.c_void_p,  # float32 numbers
            ctypes.c_void_p,  # where the blocks go
            *[ctypes.c_int64] * 3,  # the first number, rows, columns
            ctypes.c_void_p,  # weights of columns; none here
        ]
    except (OSError, AttributeError) as error:
        raise ModelError(
            f"{libraries[0]}: ggml's quantiser can't be called there ({error}); write f16, and use llama.cpp's own "
            "program: llama-quantize FILE-f16.gguf FILE-q4_k_m.gguf Q4_K_M"
        ) from error
    return ggml


def _by_ggml(numbers: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    """Rows in parts, a thread each: ctypes lets go of Python's lock while ggml works."""
    ggml = _ggml()
    columns = numbers.shape[-1]
    rows = numbers.size // columns
    out = np.empty(gguf.quant_shape_to_byte_shape(numbers.shape, kind), dtype=np.uint8)
    workers = min(os.cpu_count() or 1, rows)
    ends = [rows * part // workers for part in range(workers + 1)]

    def part(first: int, last: int) -> int:
        return int(
            ggml.ggml_quantize_chunk(
                kind.value, numbers.ctypes.data, out.ctypes.data, first * columns, last - first, columns, None
            )
        )

    with ThreadPoolExecutor(workers) as pool:
        written = sum(pool.map(part, ends, ends[1:]))
    assert written == out.nbytes, (kind, written, out.nbytes)
    return out
