"""The weights of a base, read one tensor at a time: from a folder or from memory, quantised or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phinetune.checkpoints.weight_files import check_weights
from phinetune.errors import ModelError, at_most

# The dtypes that a Phi-3's weights may have, by safetensors' names.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
NF4_BLOCK = 64  # weights that share one scale, as in transformers


class Weights(Protocol):
    """Tensors by name. `shapes` and `dtypes` are known before any tensor is read."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Do not write into it."""


def check_fit(weights: Weights, wanted: Mapping[str, tuple[int, ...]], place: Callable[[str], str], base: str) -> None:
    """Make sure that a base's weights are those of its configuration.

    Args:
        wanted: the configuration's shapes by tensor name.
        place: gives the name under which the weights hold a tensor.
        base: the base's name for the error message.

    Raises:
        ModelError: tensors are missing, or have another shape.
    """
    problems = [f"missing: {name}" for name in wanted if place(name) not in weights.shapes]
    problems += [
        f"{name}: shape {weights.shapes[place(name)]} does not match the configuration's {shape}"
        for name, shape in wanted.items()
        if weights.shapes.get(place(name), shape) != shape
    ]
    if problems:
        raise ModelError([f"{base}: the weights don't fit its config.json:", *at_most(problems, 8)])


class FolderWeights:
    """The safetensors files in a checkpoint's folder.

    `get` opens the file again for each tensor: what was read through a handle stays in memory until the handle closes.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files' headers.

        Raises:
            ModelError: files are missing or damaged, or weights have a dtype that is not in `DTYPES`.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.dtypes: Mapping[str, torch.dtype] = dtypes
        problems = []
        for file in check_weights(folder):
            try:
                for name, dtype, shape in _header(file):
                    if dtype not in DTYPES:
                        problems.append(f"{file}: {name} is {dtype}; weights of {', '.join(DTYPES)} can be read")
                        continue
                    shapes[name], dtypes[name], self._files[name] = shape, DTYPES[dtype], file
            except SafetensorError as error:
                problems.append(f"{file}: damaged: {error}")
        if problems:
            raise ModelError(problems)

    def get(self, name: str) -> Tensor:
        try:
            with safe_open(self._files[name], framework="pt") as stream:
                tensor: Tensor = stream.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self._files[name]}: damaged: {error}") from None
        return tensor


def _header(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, safetensors' dtype, shape) of every tensor of a file."""
    with safe_open(file, framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118 (the stream is not a mapping)
            part = stream.get_slice(name)
            yield name, part.get_dtype(), tuple(part.get_shape())


class MemoryWeights:
    """The state dict of a model in memory."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: tensor.dtype for name, tensor in state.items()}

    def get(self, name: str) -> Tensor:
        return self._state[name].detach()


class QuantizedWeights:
    """Weights as QLoRA trains on them.

    The decoder's linear layers are quantised and turned back; all other weights are left as they are. As in loading a
    model, a tensor is first cast to the dtype that the model computes in.
    """

    def __init__(self, weights: Weights, layers: Collection[str], kind: str, dtype: torch.dtype) -> None:
        """
        Args:
            layers: the names of the tensors to quantise.
            kind: nf4 (double quantisation, blocks of 64) or int8 (one scale per row).
            dtype: the dtype that the model computes in.

        Raises:
            ModelError: bitsandbytes is not installed.
        """
        if find_spec("bitsandbytes") is None:
            raise ModelError("merging into the quantised base needs bitsandbytes; pip install 'phinetune[quant]'")
        self._weights, self._layers, self._kind, self._dtype = weights, layers, kind, dtype
        self.shapes, self.dtypes = weights.shapes, weights.dtypes

    def get(self, name: str) -> Tensor:
        tensor = self._weights.get(name)
        if name not in self._layers:
            return tensor
        round_trip = _through_int8 if self._kind == "int8" else _through_nf4
        return round_trip(tensor.to(self._dtype))


def _through_nf4(tensor: Tensor) -> Tensor:
    """The tensor, quantised to nf4 and turned back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(tensor, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    restored: Tensor = dequantize_4bit(packed, state)
    return restored


def _through_int8(tensor: Tensor) -> Tensor:
    """The tensor, quantised to int8 and turned back."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    rows, scales, _ = int8_vectorwise_quant(tensor.to(torch.float16))
    restored: Tensor = int8_vectorwise_dequant(rows, scales)
    return restored
