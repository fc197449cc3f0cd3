"""Where a base's weights come from, one tensor at a time: a folder's files, a model in memory, either quantised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phinetune.checkpoints.load import check_weights
from phinetune.errors import ModelError, at_most

# safetensors' names of the dtypes that a Phi-3's weights come in.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
NF4_BLOCK = 64  # weights that share a scale, as transformers quantises


class Weights(Protocol):
    """Tensors by name; `shapes` and `dtypes` are known without reading any."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Not to be written into."""


def check_fit(weights: Weights, wanted: Mapping[str, tuple[int, ...]], place: Callable[[str], str], base: str) -> None:
    """Make sure that a base's weights are those of its configuration.

    Args:
        wanted: the configuration's shapes by name.
        place: the name under which the weights hold a tensor.
        base: what the error calls the base.

    Raises:
        ModelError: some are missing, or have another shape.
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
    """The safetensors files of a checkpoint's folder.

    A file is opened anew for each tensor: as long as one handle stays open, what was read through it stays in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files' headers.

        Raises:
            ModelError: files missing or damaged, or weights of a dtype that is no floating-point one.
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
        for name in stream.keys():  # noqa: SIM118 (it is no mapping)
            part = stream.get_slice(name)
            yield name, part.get_dtype(), tuple(part.get_shape())


class MemoryWeights:
    """A model's state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: tensor.dtype for name, tensor in state.items()}

    def get(self, name: str) -> Tensor:
        return self._state[name].detach()


class QuantizedWeights:
    """Weights as QLoRA trains on them: the decoder's linear layers quantised and turned back, all others as they are.

    Done as the model is loaded: cast to the dtype it computes in, then quantised tensor by tensor.
    """

    def __init__(self, weights: Weights, layers: Collection[str], kind: str, dtype: torch.dtype) -> None:
        """
        Args:
            layers: names of the tensors that are quantised.
            kind: nf4 (double quantisation, blocks of 64) or int8 (a scale a row).
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
        turned_back = _as_int8 if self._kind == "int8" else _as_nf4
        return turned_back(tensor.to(self._dtype))


def _as_nf4(tensor: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(tensor, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    made: Tensor = dequantize_4bit(packed, state)
    return made


def _as_int8(tensor: Tensor) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    rows, scales, _ = int8_vectorwise_quant(tensor.to(torch.float16))
    made: Tensor = int8_vectorwise_dequant(rows, scales)
    return made
