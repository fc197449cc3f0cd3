"""The weights of a checkpoint that bitsandbytes packed into four bits (NF4), as its files hold them.

A weight W of shape (out, in) is there as `…weight`: the codes of its elements, two in a byte. Beside it stand tensors
whose names begin with its name. `absmax` has a scale for each block of codes. With double quantisation these scales are
codes of 8 bits themselves, and `nested_absmax` has a scale for each block of them. `quant_map` and `nested_quant_map`
say what a code means. `quant_state.bitsandbytes__nf4` is JSON: the sizes of the blocks, the shape, the dtype.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.checkpoints.weight_files import DTYPES, HeldTensor, read_tensor
from phinetune.errors import ModelError, at_most, reason_of

STATE = "quant_state.bitsandbytes__nf4"
LARGEST_STATE = 4096  # bytes of that JSON; it has about two hundred
BLOCKS = tuple(2**power for power in range(5, 13))  # the sizes of blocks that bitsandbytes has
CODES, NESTED_CODES = 16, 256
NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items() if name != "F64"}


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight in NF4.

    Attributes:
        name: the weight's.
        weight: as if it were unpacked: its dtype and its shape (out, in).
        parts: the tensors that hold it, by the ends of their names; `weight` has the codes.
    """

    name: str
    weight: HeldTensor
    parts: Mapping[str, HeldTensor]

    def unpacked(self) -> Tensor:
        """The numbers that a product with this weight sees, on the CPU."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {end: read_tensor(held, f"{self.name}{end and '.'}{end}") for end, held in self.parts.items()}
        codes = parts.pop("").view(-1, 1)
        restored: Tensor = dequantize_4bit(codes, QuantState.from_dict(parts, torch.device("cpu")))
        return restored


def packed_weights(held: Mapping[str, HeldTensor], where: str) -> dict[str, PackedWeight]:
    """The NF4 weights among a checkpoint's tensors, by name. What the files say of their sizes is checked.

    Args:
        held: all tensors of the checkpoint.
        where: what the error calls its folder.

    Raises:
        ModelError: parts of a weight are missing, or do not fit together.
    """
    packed, problems = {}, []
    for name in [one.removesuffix(f".{STATE}") for one in held if one.endswith(f".{STATE}")]:
        parts = {end: held[key] for end in _ENDS if (key := f"{name}.{end}" if end else name) in held}
        try:
            packed[name] = _packed_weight(name, parts)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ModelError([f"{where}: these quantised weights are damaged:", *at_most(problems, 8)])
    return packed


def unpacked_view(held: Mapping[str, HeldTensor], packed: Mapping[str, PackedWeight]) -> dict[str, HeldTensor]:
    """The tensors of a checkpoint as if its weights were not packed."""
    parts = {f"{name}.{end}" for name, weight in packed.items() for end in weight.parts if end}
    return {name: packed[name].weight if name in packed else one for name, one in held.items() if name not in parts}


_ENDS = ("", "absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def _packed_weight(name: str, parts: Mapping[str, HeldTensor]) -> PackedWeight:
    """Raises ValueError: the parts do not fit together. bitsandbytes would read past their ends."""
    if "" not in parts:
        raise ValueError(f"its {STATE} is there, and the weight is not")
    state = _read_state(parts[STATE])
    wanted = _wanted_parts(state)
    extra = [end for end in parts if end not in wanted and end != STATE]
    if extra:
        raise ValueError(f"its {STATE} says nothing of {', '.join(extra)}")
    for end, (dtype, size) in wanted.items():
        one = parts.get(end)
        if one is None:
            raise ValueError(f"{end} is missing")
        if one.dtype != dtype or math.prod(one.shape) != size:
            words = end or "the packed weight"
            raise ValueError(f"{words} is {math.prod(one.shape):,} of {one.dtype}, and must be {size:,} of {dtype}")
    logical = dataclasses.replace(parts[""], dtype=NAMES[state["dtype"]], shape=tuple(state["shape"]))
    return PackedWeight(name, logical, dict(parts))


def _wanted_parts(state: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """The dtype and the number of elements of each tensor that holds a weight, by the end of its name."""
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    codes = {"": ("U8", -(-count // 2)), "quant_map": ("F32", CODES)}
    if "nested_blocksize" not in state:
        return codes | {"absmax": ("F32", blocks)}
    nested = {
        "nested_absmax": ("F32", -(-blocks // state["nested_blocksize"])),
        "nested_quant_map": ("F32", NESTED_CODES),
    }
    return codes | {"absmax": ("U8", blocks)} | nested


def _read_state(held: HeldTensor) -> dict[str, Any]:
    """The JSON of a weight. Raises ValueError: it is not what bitsandbytes writes."""
    size = held.end - held.start
    if held.dtype != "U8" or size > LARGEST_STATE:
        raise ValueError(f"{STATE} is {size:,} bytes of {held.dtype}, and must be at most {LARGEST_STATE:,} of U8")
    try:
        with Path(held.file).open("rb") as stream:
            stream.seek(held.start)
            state = json.loads(stream.read(size))
    except (OSError, ValueError) as error:
        raise ValueError(f"{STATE} can't be read ({reason_of(error)})") from None
    nested = _NESTED_KEYS if isinstance(state, dict) and "nested_blocksize" in state else set()
    if not isinstance(state, dict) or set(state) != _KEYS | nested:
        raise ValueError(f"{STATE} must have the keys {', '.join(sorted(_KEYS))}")
    for key in ("blocksize", *(["nested_blocksize"] if nested else [])):
        if type(state[key]) is not int or state[key] not in BLOCKS:
            raise ValueError(f"{key} is {state[key]!r}, and must be one of {', '.join(map(str, BLOCKS))}")
    _check_state(state, bool(nested))
    return state


def _check_state(state: Mapping[str, Any], nested: bool) -> None:
    shape = state["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"shape is {shape!r}, and must be two numbers above 0")
    if state["quant_type"] != "nf4":
        raise ValueError(f"quant_type is {state['quant_type']!r}, and must be 'nf4'")
    if state["dtype"] not in NAMES:
        raise ValueError(f"dtype is {state['dtype']!r}, and must be one of {', '.join(NAMES)}")
    if not nested:
        return
    if state["nested_dtype"] != "float32":
        raise ValueError(f"nested_dtype is {state['nested_dtype']!r}, and must be 'float32'")
    offset = state["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset is {offset!r}, and must be a number")
