"""What an export reads: a run merged into its base, or a plain model, as one checkpoint, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase

from phinetune.checkpoints import random_shapes as synthetic
from phinetune.checkpoints.adapters import ADAPTER_CONFIG
from phinetune.checkpoints.load import Base
from phinetune.config.run import make_config
from phinetune.errors import ModelError
from phinetune.export.base import BaseFiles, open_base
from phinetune.export.merge.merged import open_merged
from phinetune.export.merge.weight_deltas import EMBED, HEAD
from phinetune.export.merge.weights import check_fit
from phinetune.logs import quiet_libraries


class Checkpoint(Protocol):
    """A checkpoint whose tensors are read one at a time, in float32.

    Attributes:
        config: `tie_word_embeddings` says whether there is an output head of its own.
        base: which weights it is made of.
    """

    config: Phi3Config
    base: Base
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig

    def names(self) -> list[str]:
        """The tensors' names in transformers' Phi-3."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    def tensor(self, name: str) -> Tensor:
        """The tensor in float32.

        Raises:
            ModelError: it holds a value that is not finite.
        """


def open_checkpoint(path: str) -> Checkpoint:
    """A run, one of its checkpoints or an adapter folder, merged into its base; or a model as it is.

    Raises:
        ModelError: nothing there that is one of these, or an adapter that can't be merged.
    """
    if is_adapter(path):
        return open_merged(path, dtype=torch.float32)
    quiet_libraries()
    return PlainModel(open_base(make_config({"model": {"path": path}}).model))


def is_adapter(path: str) -> bool:
    """Whether a run, a checkpoint of one or another adapter folder is at `path`."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def short_name(path: str) -> str:
    """What the files made of `path` are called: `runs/demo` gives demo, `runs/demo/checkpoint-9` demo-checkpoint-9."""
    if path.startswith(synthetic.PREFIX):
        return "random"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return folder.name
    folder = folder.resolve()
    in_run = folder.name.startswith("checkpoint-") and folder.parent.name
    return f"{folder.parent.name}-{folder.name}" if in_run else folder.name


class PlainModel:
    """A model without an adapter."""

    def __init__(self, files: BaseFiles) -> None:
        """No weight is read but to see whether embedding and head are the same.

        Raises:
            ModelError: tensors are missing, or have another shape than the configuration says.
        """
        self.config, self.base = files.config, files.base
        self.tokenizer, self.generation_config = files.tokenizer, files.generation_config
        self._weights = files.weights
        self._embed = EMBED
        if self.config.tie_word_embeddings:
            self._look_at_the_tie()
        self._names = self._checked_names()

    def _look_at_the_tie(self) -> None:
        """Files may hold either of a tied pair, or both; where both differ, transformers does not tie them."""
        held = {EMBED, HEAD} & self._weights.shapes.keys()
        if held == {HEAD}:
            self._embed = HEAD
        if len(held) == 2 and not torch.equal(self._weights.get(EMBED), self._weights.get(HEAD)):
            self.config.tie_word_embeddings = False

    def _checked_names(self) -> list[str]:
        with torch.device("meta"):
            model = Phi3ForCausalLM(self.config)
        tied = self.config.tie_word_embeddings
        wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != HEAD or not tied}
        check_fit(self._weights, wanted, self._place, self.base.path)
        return list(wanted)

    def _place(self, name: str) -> str:
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
