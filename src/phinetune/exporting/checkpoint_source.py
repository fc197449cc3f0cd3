"""The checkpoint that an export reads, tensor by tensor: a run merged into its base, or a model without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from phinetune.checkpoints import random_shapes
from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG
from phinetune.checkpoints.load import Base
from phinetune.checkpoints.whole import EMBED, HEAD, meta_model
from phinetune.config.run import make_config
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError
from phinetune.exporting.base_files import BaseFiles, open_base
from phinetune.exporting.merge.merged import open_merged
from phinetune.logs import quiet_libraries


class Checkpoint(Protocol):
    """A checkpoint whose tensors are read one at a time, in float32.

    Attributes:
        config: its `tie_word_embeddings` says whether embedding and output head are one tensor.
        base: which weights the checkpoint is made of.
    """

    config: ModelConfig
    base: Base
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig

    def names(self) -> list[str]:
        """The tensors' names, as in transformers' Phi-3."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    def tensor(self, name: str) -> Tensor:
        """The tensor in float32.

        Raises:
            ModelError: the tensor holds a value that is not finite.
        """


def open_checkpoint(path: str) -> Checkpoint:
    """Open a run, one of its checkpoints or an adapter folder, merged into its base; or open a model as it is.

    Raises:
        ModelError: there is none of these at `path`, or the adapter can't be merged.
    """
    if is_adapter(path):
        return open_merged(path, dtype=torch.float32)
    quiet_libraries()
    return UnadaptedCheckpoint(open_base(make_config({"model": {"path": path}}).model))


def is_adapter(path: str) -> bool:
    """Whether there is a run, a run's checkpoint or another adapter folder at `path`."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def short_name(path: str) -> str:
    """The name for files made of `path`: `runs/demo` gives demo, `runs/demo/checkpoint-9` gives demo-checkpoint-9."""
    if path.startswith(random_shapes.PREFIX):
        return "random"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return folder.name
    folder = folder.resolve()
    in_run = folder.name.startswith("checkpoint-") and folder.parent.name
    return f"{folder.parent.name}-{folder.name}" if in_run else folder.name


class UnadaptedCheckpoint:
    """The checkpoint of a model without an adapter."""

    def __init__(self, files: BaseFiles) -> None:
        """Of the weights at most two are read: embedding and head, to compare them.

        Raises:
            ModelError: tensors are missing, or their shapes differ from the configuration's.
        """
        self.config, self.base = files.config, files.base
        self.tokenizer, self.generation_config = files.tokenizer, files.generation_config
        self._weights = files.weights
        self._embed = EMBED
        if self.config.tie_word_embeddings:
            self._resolve_tie()
        self._names = self._tensor_names()

    def _resolve_tie(self) -> None:
        """Find out where the files hold a tied pair.

        They may hold the embedding, the head or both. If they hold both and these differ, transformers does not tie
        them.
        """
        held = {EMBED, HEAD} & self._weights.shapes.keys()
        if held == {HEAD}:
            self._embed = HEAD
        if len(held) == 2 and not torch.equal(self._weights.get(EMBED), self._weights.get(HEAD)):
            self.config.tie_word_embeddings = False

    def _tensor_names(self) -> list[str]:
        """The names of the model's tensors. The weights hold all of them (`open_base`)."""
        tied = self.config.tie_word_embeddings
        model = meta_model(self.base.path, self.config)
        return [name for name in model.state_dict() if name != HEAD or not tied]

    def _place(self, name: str) -> str:
        """The name under which the files hold a tensor."""
        return self._embed if name == EMBED else name

    def names(self) -> list[str]:
        return list(self._names)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._weights.shapes[self._place(name)]

    def tensor(self, name: str) -> Tensor:
        weight = self._weights.get(self._place(name)).float()
        if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
            raise ModelError(f"{name}: the weights of {self.base.path} hold values that are not finite")
        return weight
