"""A base and an adapter as the one checkpoint they make together, merged tensor by tensor when asked for.

One tensor is merged at a time and nothing of the base stays in memory, so a reader needs room for the adapter and for
what he keeps himself.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from phinetune.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_base, read_adapter_config
from phinetune.checkpoints.opened import recorded_config
from phinetune.config.run import ModelSection
from phinetune.errors import ModelError
from phinetune.export.base import BaseFiles, open_base, quantized, trained_dtype
from phinetune.export.merge.weight_deltas import EMBED, HEAD, Change, read_changes
from phinetune.export.merge.weights import check_fit
from phinetune.logs import quiet_libraries
from phinetune.run_folder import RunFolder

MERGED_FILE = "merged.json"  # what `phinetune merge` leaves beside the weights it wrote
SHARD_BYTES = 1_000_000_000
OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "16bit"


class MergedCheckpoint:
    """What a base and an adapter make together; `open_merged` makes one.

    Attributes:
        config: the merged model's: its dtype, and `tie_word_embeddings` off where the adapter demands it.
        base: which weights the adapter is merged into.
        folder: the base's folder; None for a `random:` base, which has none.
        tokenizer: the base's.
        generation_config: the base's, with every id that ends a turn.
        adapter: PEFT's configuration of the adapter.
        source: the folder of the adapter.
        base_weights: `16bit`, or how the base was quantised before (`nf4`, `int8`).
        untied: whether the base's embedding and head are one and the merged model's are two.
    """

    def __init__(
        self, source: Path, files: BaseFiles, dtype: torch.dtype | None = None, base_weights: str = PLAIN
    ) -> None:
        """Read the adapter and lay it on; no weight of the base is read but to see whether two are the same.

        Args:
            dtype: of the merged tensors; None keeps each tensor's own.

        Raises:
            ModelError: the adapter or the base's files don't fit the configuration.
        """
        self.source, self.base_weights = source, base_weights
        self.base, self.folder = files.base, files.folder
        self.tokenizer, self.generation_config = files.tokenizer, files.generation_config
        self.adapter: LoraConfig = read_adapter_config(source)
        self._weights, self._dtype = files.weights, dtype
        shapes, self._changes = read_changes(files.config, self.adapter, source)
        self._one_base = self._is_tied(bool(files.config.tie_word_embeddings))
        tied = self._one_base and (bool(self.adapter.ensure_weight_tying) or not {EMBED, HEAD} & self._changes.keys())
        self.untied = self._one_base and not tied
        self._names = self._in_order({name: shape for name, shape in shapes.items() if name != HEAD or not tied})
        self.config = copy.deepcopy(files.config)
        self.config.tie_word_embeddings = tied
        self.config.dtype = self.dtype_of(EMBED)
        self.config.architectures = ["Phi3ForCausalLM"]

    def _is_tied(self, declared: bool) -> bool:
        """Whether embedding and head of the base are one, decided as transformers does: by what the files hold, too."""
        if not declared or not {EMBED, HEAD} <= self._weights.shapes.keys():
            return declared
        return torch.equal(self._weights.get(EMBED), self._weights.get(HEAD))

    def _in_order(self, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The model's tensors in the order of the base's files.

        Raises:
            ModelError: some are missing there, or have another shape.
        """
        check_fit(self._weights, wanted, self._place, self.base.path)
        order = {name: i for i, name in enumerate(self._weights.shapes)}
        return sorted(wanted, key=lambda name: order.get(name, len(order)))

    def _place(self, name: str) -> str:
        """The name under which the base's files hold a tensor: of a tied pair they may hold either."""
        if self._one_base and name in (EMBED, HEAD) and name not in self._weights.shapes:
            return HEAD if name == EMBED else EMBED
        return name

    def names(self) -> list[str]:
        """The tensors' names in the order of the base's files; a head that is tied no more comes last."""
        return list(self._names)

    def changed(self) -> list[str]:
        """The names of the tensors that the adapter changes, in the same order."""
        return [name for name in self._names if name in self._changes]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._weights.shapes[self._place(name)]

    def dtype_of(self, name: str) -> torch.dtype:
        """The merged tensor's dtype: the one asked for, else the base's own."""
        return self._dtype or self._weights.dtypes[self._place(name)]

    def bytes_of(self, name: str) -> int:
        """The merged tensor's size in bytes, without reading it."""
        return int(torch.Size(self.shape_of(name)).numel() * self.dtype_of(name).itemsize)

    def tensor(self, name: str) -> Tensor:
        """The merged tensor: product and sum in float32, cast once.

        Raises:
            ModelError: it would hold a value that is not finite.
            KeyError: there is no such tensor.
        """
        if name not in self._names:
            raise KeyError(name)
        weight = self._weights.get(self._place(name))
        change = self._changes.get(name)
        dtype = self.dtype_of(name)
        merged = change.applied(weight, dtype) if change else weight.to(dtype)
        if not _is_finite(merged):
            raise ModelError(self._why_not_finite(name, weight, change))
        return merged

    def _why_not_finite(self, name: str, weight: Tensor, change: Change | None) -> str:
        if not _is_finite(weight):
            return f"{name}: the weights of {self.base.path} hold values that are not finite"
        if change and not _is_finite(change.applied(weight, torch.float32)):
            return f"{name}: with the adapter in {self.source} it holds values that are not finite"
        dtype = str(self.dtype_of(name)).removeprefix("torch.")
        return f"{name}: it holds values that are too large for {dtype}; merge with --dtype bfloat16 or float32"

    def plan(self, limit: int = SHARD_BYTES) -> list[list[str]]:
        """The names in shards of at most `limit` bytes; a tensor that is larger has one to itself."""
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
        """The merged tensors in the shards of `plan`, each emptied when the next is asked for: one is in memory."""
        for names in self.plan(limit):
            shard = {name: self.tensor(name) for name in names}
            yield shard
            shard.clear()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are: by the smallest and the largest, both NaN where any is; no mask is made."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def open_merged(run: str | Path, *, dtype: str | torch.dtype | None = None, base: str = PLAIN) -> MergedCheckpoint:
    """The checkpoint that a run, one of its checkpoints or an adapter folder makes with its base.

    Args:
        dtype: float32, bfloat16 or float16; None keeps the dtype of the base's files.
        base: `16bit`, or `quantized`: merge into what is left of the base's weights after their quantisation.

    Raises:
        ModelError: no adapter there, one for another base, one that can't be merged or is merged already.
    """
    quiet_libraries()
    wanted = _wanted_dtype(dtype)
    source = Path(run).expanduser()
    _check_adapter_folder(source)
    section = recorded_config(source).model
    kind = _base_weights(base, section, source)
    files = open_base(section)
    check_base(files.base, source)
    _check_not_merged(files.folder, source)
    if kind != PLAIN:
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
    """16bit, nf4 or int8. Another tool's adapter says nothing of its base's quantisation: nf4 is QLoRA's."""
    if base == PLAIN:
        return PLAIN
    if base != "quantized":
        raise ModelError(f"base `{base}`: an adapter is merged into the base's {PLAIN} or its quantized weights")
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
    """Refuse an adapter on a base that it was merged into before, which its own record can't tell if it has none."""
    file = folder / MERGED_FILE if folder else None
    if file is None or not file.is_file():
        return
    try:
        digest = json.loads(file.read_text(encoding="utf-8"))["adapter"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: broken: {error}") from None
    if digest == adapter_digest(source):
        raise ModelError(f"{source}: already merged: {folder} is the base with this very adapter in it")


def adapter_digest(source: Path) -> str:
    """SHA-256 of an adapter's weights."""
    return hashlib.sha256((source / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
