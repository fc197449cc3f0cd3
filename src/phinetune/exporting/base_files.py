"""The base of an adapter, opened without loading the model: weights, configuration and tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from phinetune.checkpoints import random_shapes
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.load import (
    Base,
    base_in,
    check_checkpoint,
    find_folder,
    load_base,
    load_tokenizer,
    read_config,
    read_generation,
    with_stop_ids,
)
from phinetune.checkpoints.prequantized import check_readable
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.config.model import ModelSection
from phinetune.engine.families import ModelConfig, plain_model
from phinetune.errors import ModelError
from phinetune.exporting.merge.weights import FolderWeights, MemoryWeights, QuantizedWeights, Weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFiles:
    """A base and what its files hold.

    Attributes:
        base: which weights these are.
        folder: the base's folder; None for a `random:` base, which is made in memory.
        generation_config: the base's, with every id that ends a turn.
    """

    base: Base
    folder: Path | None
    weights: Weights
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig


def open_base(section: ModelSection) -> BaseFiles:
    """Open the base that `section` names. Of a folder's weight files, only the headers are read.

    Raises:
        ModelError: the base does not exist, is not a Phi-3, is damaged, …
    """
    if section.path.startswith(random_shapes.PREFIX):
        return _open_random(section)
    folder, revision = find_folder(section.path, section.revision)
    config = read_config(folder)
    check_checkpoint(folder, config)
    base = base_in(folder, section.path, revision)
    tokenizer = load_tokenizer(section, base, config)
    generation = with_stop_ids(read_generation(folder, config), tokenizer)
    weights = FolderWeights(folder)
    if weights.packed:
        check_readable(section.path)
        dtypes = {str(weights.dtypes[name]).removeprefix("torch.") for name in weights.packed}
        logger.warning("%s: its weights are in nf4; they are turned back into %s", base.path, ", ".join(sorted(dtypes)))
        del config.quantization_config  # of the files, and not of `weights`
    return BaseFiles(base, folder, weights, config, tokenizer, generation)


def _open_random(section: ModelSection) -> BaseFiles:
    """Make a `random:` base in memory.

    It has the dtype that the run trained in, because the dtype decides which random numbers are drawn.
    """
    dtype = str(trained_dtype(section)).removeprefix("torch.")
    unquantized = section.model_copy(update={"device": "cpu", "dtype": dtype, "quantization": "none"})
    loaded = load_base(unquantized, fast=False)
    generation = loaded.model.generation_config or GenerationConfig()
    weights, config = MemoryWeights(loaded.model.state_dict()), cast(ModelConfig, loaded.model.config)
    return BaseFiles(loaded.base, None, weights, config, loaded.tokenizer, generation)


def trained_dtype(section: ModelSection) -> torch.dtype:
    """The dtype that a run's model computes in. For a run of another machine it is what this machine would take."""
    try:
        device = pick_device(section.device)
    except ModelError:  # another machine trained it, and this one lacks its device
        device = pick_device()
    return pick_dtype(section.dtype, device)


def quantized(files: BaseFiles, kind: str, dtype: torch.dtype) -> BaseFiles:
    """The same base with the weights that QLoRA trains on; see `QuantizedWeights`."""
    with torch.device("meta"):
        model = plain_model(files.config)
    layers = {f"{name}.weight" for name in linear_layers(model)}
    return replace(files, weights=QuantizedWeights(files.weights, layers, kind, dtype))
