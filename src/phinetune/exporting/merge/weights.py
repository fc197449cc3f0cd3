"""The weights of a base, read one tensor at a time: from a folder or from memory, quantised or not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from phinetune.checkpoints.packed_weights import packed_weights, unpacked_view
from phinetune.checkpoints.weight_files import DTYPES, held_tensors, read_tensor, unreadable_dtypes
from phinetune.errors import ModelError, at_most

NF4_BLOCK = 64  # weights that share one scale, as in transformers


class Weights(Protocol):
    """Tensors by name. `shapes` and `dtypes` are known before any tensor is read."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU. Do not write into it."""


class FolderWeights:
    """The safetensors files in a checkpoint's folder. Weights that are there in NF4 are unpacked when they are read.

    `get` opens the file again for each tensor: what was read through a handle stays in memory until the handle closes.

    Attributes:
        packed: the names of the weights that are there in NF4.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files' headers.

        Raises:
            ModelError: files are missing or damaged, or weights have a dtype that is not in `DTYPES`.
        """
        held = held_tensors(folder)
        self._packed = packed_weights(held, str(folder))
        self._held = unpacked_view(held, self._packed)
        self.packed = frozenset(self._packed)
        problems = unreadable_dtypes(self._held)
        if problems:
            raise ModelError([f"{folder}: {problem}" for problem in at_most(problems, 8)])
        self.shapes: Mapping[str, tuple[int, ...]] = {name: held.shape for name, held in self._held.items()}
        self.dtypes: Mapping[str, torch.dtype] = {name: DTYPES[held.dtype] for name, held in self._held.items()}

    def get(self, name: str) -> Tensor:
        if name in self._packed:
            return self._packed[name].unpacked()
        return read_tensor(self._held[name], name)


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
