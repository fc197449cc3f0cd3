"""A run prepared from its configuration, without a weight loaded: the one way for training, plans and servers.

`settle` looks at the configuration alone. `prepare_run` also reads the checkpoint's small files and the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import Phi3Config, PreTrainedTokenizerBase
from trl import SFTConfig

from phinetune import processes
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.load import check_checkpoint
from phinetune.checkpoints.quantize import check_quantization
from phinetune.checkpoints.tokenizer import open_config, open_tokenizer
from phinetune.checkpoints.tokenizer_files import check_vocabulary
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import Chats
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.sources import check_sources
from phinetune.engine.choice import EngineChoice, choose_engine
from phinetune.errors import ConfigError
from phinetune.training.beginning import settle_start
from phinetune.training.best_checkpoint import settle_best
from phinetune.training.limits import limit_length, without_fp16
from phinetune.training.objective_keys import with_objective_keys
from phinetune.training.objectives.objective import Objective
from phinetune.training.rehearsal import rehearse
from phinetune.training.settings import Settings, make_training_args, not_for_the_fast_engine, read_settings
from phinetune.training.steps import Steps, check_full_batch, count_steps, row_lengths
from phinetune.training.trained_parts import check_trained_parts
from phinetune.training.warm_start import settle_adapter, with_adapters_base


@dataclass(frozen=True)
class SettledRun:
    """A configuration that has been looked at as a whole."""

    config: RunConfig
    settings: Settings
    objective: Objective

    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """How the run's rows become examples."""
        data = self.config.data
        encoder = make_encoder(tokenizer, data.loss_on, data.system)
        return self.objective.row_encoder(data, encoder, self.settings.max_length)


@dataclass(frozen=True)
class PreparedRun(SettledRun):
    """All that a run has before its weights are loaded.

    Attributes:
        device, dtype: of the weights.
        shape: the model's configuration.
        engine: fast or plain, with the reason.
        args: TRL's arguments for this device and engine.
        rows: how rows become examples.
        chats: the encoded training chats and held-out chats.
    """

    device: torch.device
    dtype: torch.dtype
    shape: Phi3Config
    engine: EngineChoice
    args: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: RowEncoder
    chats: Chats

    @cached_property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Tokens of each row that a micro-batch is made of, shape (rows)."""
        return np.asarray(self.objective.row_tokens(row_lengths(self.chats.train, self.engine.fast)))

    @cached_property
    def steps(self) -> Steps:
        """The optimizer steps that the run will take."""
        return count_steps(self.lengths, self.args, self.config.data.streaming)


def settle(config: RunConfig) -> SettledRun:
    """Check a configuration as a whole: both dictionaries, the objective, the best checkpoint, the data's sources.

    Raises:
        PhinetuneError: what can be said without reading a row.
    """
    config, objective, notes = with_objective_keys(with_adapters_base(config))
    settings = read_settings(config.peft_config, config.training_config)
    settings = settle_best(replace(settings, notes=[*notes, *settings.notes]), config, objective)
    settings = settle_start(settings, config.model.quantization)
    check_sources(config.data)
    if config.data.streaming and int(settings.training.get("max_steps") or -1) < 1:
        raise ConfigError("data.streaming: a stream has no known end, so set training_config.max_steps")
    if refused := objective.refused(settings.training):
        raise ConfigError(refused)
    if config.data.streaming and objective.reference:
        raise ConfigError(
            f"data.streaming: {objective.kind} computes the reference's log-probabilities of all rows before its first "
            "step, and a stream's are not known by then; set data.streaming: false"
        )
    return SettledRun(config, settings, objective)


def prepare_run(settled: SettledRun) -> PreparedRun:
    """Choose the engine, read and encode the chats. Every process of a run calls it.

    Raises:
        PhinetuneError: anything that would stop the run before its first step, as far as the weights don't matter.
    """
    config, settings, objective = settled.config, settled.settings, settled.objective
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    with processes.main_first():  # a starter model is made once
        shape, tokenizer = open_config(config.model), open_tokenizer(config.model)
    settings = without_fp16(limit_length(settings, shape), device, dtype)
    _check_base(config.model, tokenizer, shape)
    config, settings = settle_adapter(config, settings)
    settled = replace(settled, config=config, settings=settings)
    engine = choose_engine(config, settings.training, settings.peft, settings.max_length, dtype, shape)
    _check_engine(objective, engine)
    args = make_training_args(settings, config.output_dir, device, dtype, fast=engine.fast is not None)
    settings = replace(settings, notes=[*settings.notes, *rehearse(settings, args, shape)])
    check_trained_parts(settings, config.model, shape, device, dtype)
    if engine.fast:
        settings = replace(settings, notes=[*settings.notes, *not_for_the_fast_engine(settings)])
    rows = settled.row_encoder(tokenizer)
    chats = build_chats(rows)
    run = PreparedRun(config, settings, objective, device, dtype, shape, engine, args, tokenizer, rows, chats)
    if args.dataloader_drop_last and not config.data.streaming:
        check_full_batch(run.lengths, args)
    return run


def _check_base(model: ModelSection, tokenizer: PreTrainedTokenizerBase, shape: Phi3Config) -> None:
    check_vocabulary(tokenizer, shape, model.tokenizer or model.path)
    check_quantization(model.quantization)
    folder = Path(model.path).expanduser()
    if folder.is_dir():  # a hub id's weights are not here yet
        check_checkpoint(folder, shape)


def _check_engine(objective: Objective, engine: EngineChoice) -> None:
    if engine.fast is None and objective.plain_trainer() is None:
        raise ConfigError(
            f"objective: {objective.kind} trains on the fast engine only, and {engine.reason} needs the plain one"
        )
    if engine.fast and engine.fast.fill and not objective.can_fill:
        raise ConfigError(f"data.packing: {objective.kind} does not fill rows; leave packing at `conversations`")
