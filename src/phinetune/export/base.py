"""The base that an adapter was trained on, opened without loading it: its files, configuration and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase

from phinetune.checkpoints import random_shapes as synthetic
from phinetune.checkpoints.adapters import linear_layers
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.load import (
    Base,
    find_folder,
    fingerprint,
    load_base,
    load_tokenizer,
    read_config,
    read_generation,
    with_stop_ids,
)
from phinetune.config.run import ModelSection
from phinetune.errors import ModelError
from phinetune.export.merge.weights import FolderWeights, MemoryWeights, QuantizedWeights, Weights


@dataclass(frozen=True)
class BaseFiles:
    """A base as its files have it.

    Attributes:
        base: which weights these are.
        folder: where they lie; None for a `random:` base, which is made in memory.
        generation_config: with every id that ends a turn.
    """

    base: Base
    folder: Path | None
    weights: Weights
    config: Phi3Config
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig


def open_base(section: ModelSection) -> BaseFiles:
    """The base that `section` names; of a folder nothing but headers is read.

    Raises:
        ModelError: not there, not of the family, damaged, …
    """
    if section.path.startswith(synthetic.PREFIX):
        return _open_random(section)
    folder, revision = find_folder(section.path, section.revision)
    config = read_config(folder)
    base = Base(section.path, revision, fingerprint(folder))
    tokenizer = load_tokenizer(section, base, config)
    generation = with_stop_ids(read_generation(folder, config), tokenizer)
    return BaseFiles(base, folder, FolderWeights(folder), config, tokenizer, generation)


def _open_random(section: ModelSection) -> BaseFiles:
    """A `random:` base, made in memory in the dtype it was trained in, since that decides what is drawn."""
    dtype = str(trained_dtype(section)).removeprefix("torch.")
    plain = section.model_copy(update={"device": "cpu", "dtype": dtype, "quantization": "none"})
    loaded = load_base(plain, fast=False)
    generation = loaded.model.generation_config or GenerationConfig()
    weights = MemoryWeights(loaded.model.state_dict())
    return BaseFiles(loaded.base, None, weights, loaded.model.config, loaded.tokenizer, generation)


def trained_dtype(section: ModelSection) -> torch.dtype:
    """The dtype that a run's model computes in, as far as this machine can tell."""
    try:
        device = pick_device(section.device)
    except ModelError:  # trained on another machine
        device = pick_device()
    return pick_dtype(section.dtype, device)


def quantized(files: BaseFiles, kind: str, dtype: torch.dtype) -> BaseFiles:
    """The same base with the weights that QLoRA trains on: see `QuantizedWeights`."""
    with torch.device("meta"):
        model = Phi3ForCausalLM(files.config)
    layers = {f"{name}.weight" for name in linear_layers(model)}
    return replace(files, weights=QuantizedWeights(files.weights, layers, kind, dtype))
