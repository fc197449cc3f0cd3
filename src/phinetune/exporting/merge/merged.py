"""The checkpoint that a base and an adapter make together. A tensor is merged when a reader asks for it.

One tensor is merged at a time, and nothing of the base stays in memory. So a reader needs memory only for the adapter
and for the merged tensors that it keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phinetune.checkpoints.adapters import check_base, read_adapter_config
from phinetune.checkpoints.foreign_adapters import peft_folder
from phinetune.checkpoints.load import read_shape
from phinetune.checkpoints.opened import recorded_config
from phinetune.checkpoints.prequantized import own_form
from phinetune.checkpoints.small_files import read_json
from phinetune.checkpoints.whole import EMBED, HEAD
from phinetune.config.model import ModelSection
from phinetune.engine.families import transformers_class
from phinetune.errors import ModelError, reason_of
from phinetune.exporting.base_files import BaseFiles, open_base, quantized, trained_dtype
from phinetune.exporting.merge.weight_deltas import WeightDelta, read_weight_deltas
from phinetune.files import file_digest
from phinetune.logs import quiet_libraries
from phinetune.run_folder import RunFolder

MERGED_FILE = "merged.json"  # `phinetune merge` writes it beside the weights
SHARD_BYTES = 1_000_000_000
OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIXTEEN_BIT = "16bit"  # the base's own weights, not quantised
OWN_NF4 = "own nf4"  # the base's own weights, which its files hold in nf4


class MergedCheckpoint:
    """A base with an adapter merged into it. `open_merged` makes one.

    Attributes:
        config: the merged model's configuration: its dtype, and `tie_word_embeddings` off if the adapter changes the
            embedding or the head and not both alike.
        base: which weights the adapter is merged into.
        folder: the base's folder; None for a `random:` base, which has none.
        tokenizer: the base's.
        generation_config: the base's, with every id that ends a turn.
        adapter: PEFT's configuration of the adapter.
        source: the folder of the adapter.
        base_weights: `16bit`; how the base was quantised before the merge (`nf4`, `int8`); or `own nf4` of a base whose
            files are quantised.
        untied: whether the base's embedding and head are one tensor and the merged model's are two.
    """

    def __init__(
        self, source: Path, files: BaseFiles, dtype: torch.dtype | None = None, base_weights: str = SIXTEEN_BIT
    ) -> None:
        """Read the adapter. Of the base's weights at most two are read: embedding and head, to compare them.

        Args:
            dtype: the dtype of the merged tensors; None keeps each tensor's own.

        Raises:
            ModelError: the adapter or the base's files don't fit the configuration.
        """
        self.source, self.base_weights = source, base_weights
        self.base, self.folder = files.base, files.folder
        self.tokenizer, self.generation_config = files.tokenizer, files.generation_config
        self.adapter: LoraConfig = read_adapter_config(source)
        self._weights, self._dtype = files.weights, dtype
        shapes, self._deltas = read_weight_deltas(files.config, self.adapter, source)
        self._base_is_tied = self._is_tied(bool(files.config.tie_word_embeddings))
        keeps_tie = bool(self.adapter.ensure_weight_tying) or not {EMBED, HEAD} & self._deltas.keys()
        tied = self._base_is_tied and keeps_tie
        self.untied = self._base_is_tied and not tied
        self._names = self._in_order({name: shape for name, shape in shapes.items() if name != HEAD or not tied})
        self.config = copy.deepcopy(files.config)
        self.config.tie_word_embeddings = tied
        self.config.dtype = self.dtype_of(EMBED)
        self.config.architectures = [transformers_class(files.config).__name__]

    def _is_tied(self, declared: bool) -> bool:
        """Whether embedding and head of the base are one tensor.

        transformers ties them if the configuration says so, unless the files hold both and these differ.
        """
        if not declared or not {EMBED, HEAD} <= self._weights.shapes.keys():
            return declared
        return torch.equal(self._weights.get(EMBED), self._weights.get(HEAD))

    def _in_order(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The model's tensors in the order of the base's files, which hold all of them (`open_base`)."""
        order = {name: i for i, name in enumerate(self._weights.shapes)}
        return sorted(wanted, key=lambda name: order.get(name, len(order)))

    def _place(self, name: str) -> str:
        """The name under which the base's files hold a tensor. The files may hold either name of a tied pair."""
        if self._base_is_tied and name in (EMBED, HEAD) and name not in self._weights.shapes:
            return HEAD if name == EMBED else EMBED
        return name

    def names(self) -> list[str]:
        """The tensors' names in the order of the base's files. A head that is no longer tied comes last."""
        return list(self._names)

    def changed(self) -> list[str]:
        """The names of the tensors that the adapter changes, in the same order."""
        return [name for name in self._names if name in self._deltas]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._weights.shapes[self._place(name)]

    def dtype_of(self, name: str) -> torch.dtype:
        """The merged tensor's dtype: the dtype asked for, or else the base's own."""
        return self._dtype or self._weights.dtypes[self._place(name)]

    def bytes_of(self, name: str) -> int:
        """The merged tensor's size in bytes, without reading it."""
        return int(torch.Size(self.shape_of(name)).numel() * self.dtype_of(name).itemsize)

    def tensor(self, name: str) -> Tensor:
        """The merged tensor. Product and sum are computed in float32 and cast once.

        Raises:
            ModelError: the merged tensor would hold a value that is not finite.
            KeyError: there is no such tensor.
        """
        if name not in self._names:
            raise KeyError(name)
        weight = self._weights.get(self._place(name))
        delta = self._deltas.get(name)
        dtype = self.dtype_of(name)
        merged = delta.apply_to(weight, dtype) if delta else weight.to(dtype)
        if not _is_finite(merged):
            raise ModelError(self._why_not_finite(name, weight, delta))
        return merged

    def _why_not_finite(self, name: str, weight: Tensor, delta: WeightDelta | None) -> str:
        if not _is_finite(weight):
            return f"{name}: the weights of {self.base.path} hold values that are not finite"
        if delta and not _is_finite(delta.apply_to(weight, torch.float32)):
            return f"{name}: with the adapter in {self.source} it holds values that are not finite"
        dtype = str(self.dtype_of(name)).removeprefix("torch.")
        return f"{name}: it holds values that are too large for {dtype}; merge with --dtype bfloat16 or float32"

    def plan(self, limit: int = SHARD_BYTES) -> list[list[str]]:
        """The names, divided into shards of at most `limit` bytes. A larger tensor has a shard of its own."""
        shards: list[list[str]] = []
        size = 0
        for name in self._names:
            if not shards or size + self.bytes_of(name) > limit:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += self.bytes_of(name)
        return shards

    def shards(self, limit: int = SHARD_BYTES) -> Iterator[dict[str, Tensor]]:
        """The merged tensors in the shards of `plan`. One shard is in memory: asking for the next empties the last."""
        for names in self.plan(limit):
            shard = {name: self.tensor(name) for name in names}
            yield shard
            shard.clear()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite.

    The smallest and the largest value tell, as both are NaN if any value is. This needs no memory for a mask.
    """
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def open_merged(
    run: str | Path, *, dtype: str | torch.dtype | None = None, base: str = SIXTEEN_BIT
) -> MergedCheckpoint:
    """Open a run, one of its checkpoints or an adapter folder, merged into its base.

    Args:
        dtype: float32, bfloat16 or float16; None keeps the dtype of the base's files.
        base: `16bit`, or `quantized`: merge into the weights that QLoRA trains on, quantised and turned back. Of a base
            whose files are quantised, both are what the files hold, turned back.

    Raises:
        ModelError: there is no adapter, it belongs to another base, it can't be merged, or it is merged already.
    """
    quiet_libraries()
    wanted = _wanted_dtype(dtype)
    source = peft_folder(run)
    _check_adapter_folder(source)
    section = recorded_config(source).model
    kind = _base_weights(base, section, source)
    files = open_base(section)
    check_base(files.base, source)
    _check_not_merged(files.folder, source)
    if kind not in (SIXTEEN_BIT, OWN_NF4):
        files = quantized(files, kind, trained_dtype(section))
    return MergedCheckpoint(source, files, wanted, kind)


def _wanted_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in OUTPUT_DTYPES:
        raise ModelError(f"dtype `{name}`: a merged model is written in {', '.join(OUTPUT_DTYPES)}")
    return OUTPUT_DTYPES[name]


def _base_weights(base: str, section: ModelSection, source: Path) -> str:
    """The `base_weights` of the `MergedCheckpoint`.

    The adapter of another tool has no record of how its base was quantised. For these it is nf4, as in QLoRA.
    """
    if base not in (SIXTEEN_BIT, "quantized"):
        raise ModelError(f"base `{base}`: an adapter is merged into the base's {SIXTEEN_BIT} or its quantized weights")
    if own_form(read_shape(section), section.path) == "nf4":
        return OWN_NF4
    if base == SIXTEEN_BIT:
        return SIXTEEN_BIT
    if section.quantization != "none":
        return section.quantization
    if RunFolder(source).is_run or RunFolder(source.parent).is_run:
        raise ModelError(f"{source}: its base was not quantised in training; leave --base quantized out")
    return "nf4"


def _check_adapter_folder(source: Path) -> None:
    if (source / ADAPTER_CONFIG).is_file():
        return
    if (source / MERGED_FILE).is_file():
        raise ModelError(f"{source}: already merged: no adapter there")
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder; give a run, one of its checkpoints or an adapter folder")
    what = "a model, not an adapter" if (source / "config.json").is_file() else f"no adapter there ({ADAPTER_CONFIG})"
    raise ModelError(f"{source}: {what}; give a run, one of its checkpoints or an adapter folder")


def _check_not_merged(folder: Path | None, source: Path) -> None:
    """Refuse an adapter if its base is the model that it was merged into before.

    `check_base` can't tell this for an adapter without a record of its base.
    """
    file = folder / MERGED_FILE if folder else None
    if file is None or not file.is_file():
        return
    try:
        digest = read_json(file)["adapter"]["sha256"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{file}: broken: {reason_of(error)}") from None
    if digest == adapter_digest(source):
        raise ModelError(f"{source}: already merged: {folder} is the base with this adapter already in it")


def adapter_digest(source: Path) -> str:
    """SHA-256 of an adapter's weights file."""
    return file_digest(source / ADAPTER_WEIGHTS)
