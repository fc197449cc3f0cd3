"""A run prepared from its configuration, without a weight loaded: the one way for training, plans and servers.

`settle` looks at the configuration alone. `prepare_run` also reads the checkpoint's small files and the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from phinetune import processes
from phinetune.chats.encoder import make_encoder
from phinetune.chats.tagged_text import tags_of
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.load import check_checkpoint
from phinetune.checkpoints.prequantized import held_as
from phinetune.checkpoints.tokenizer import open_config, open_tokenizer
from phinetune.checkpoints.tokenizer_files import check_vocabulary
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import Chats
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.sources import check_sources
from phinetune.engine.choice import EngineChoice, choose_engine
from phinetune.engine.families import ModelConfig
from phinetune.errors import ConfigError
from phinetune.training.auto_settings import UNLIKE_ROWS, Choice, length_cap
from phinetune.training.beginning import settle_start
from phinetune.training.best_checkpoint import settle_best
from phinetune.training.choosing import (
    Ground,
    choose,
    expect_evaluations,
    parameters_a_rank,
    room_for_tokens,
    with_choices,
)
from phinetune.training.limits import limit_length, without_fp16
from phinetune.training.objective_keys import with_objective_keys
from phinetune.training.objectives.objective import Objective
from phinetune.training.rehearsal import rehearse
from phinetune.training.replay import check_replay, with_replay
from phinetune.training.scored_rows import spread
from phinetune.training.settings import (
    Settings,
    check_plain,
    make_training_args,
    not_for_the_fast_engine,
    read_settings,
)
from phinetune.training.steps import Steps, check_full_batch, count_steps, row_lengths
from phinetune.training.trained_parts import check_trained_parts
from phinetune.training.unlike_rows import share_in_one_row
from phinetune.training.warm_start import settle_adapter, with_adapters_base

CHOSEN = "chosen"  # the key of start.json
NO_HELD_OUT = (
    "a race is decided on held-out rows, and there are none; set data.eval (a share such as 0.1, or a file), or "
    "training_config.learning_rate: auto"
)


@dataclass(frozen=True)
class SettledRun:
    """A configuration that has been looked at as a whole."""

    config: RunConfig
    settings: Settings
    objective: Objective

    def row_encoder(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """How the run's rows become examples."""
        data = self.config.data
        encoder = make_encoder(tokenizer, data.loss_on, data.system, tags_of(data))
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
        choices: the settings that were left open, with the reasons; and given ones that are far from their rules.
        recorded: of a run that goes on, what it chose when it began, by `section.key`.
    """

    device: torch.device
    dtype: torch.dtype
    shape: ModelConfig
    engine: EngineChoice
    args: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: RowEncoder
    chats: Chats
    choices: list[Choice] = field(default_factory=list)
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[str, Any]:
        """What was left open, by `section.key`, as start.json keeps it for a later `--resume`."""
        return {**self.recorded, **{one.key: one.value for one in self.choices if not one.given}}

    @property
    def scored(self) -> list[int] | None:
        """The places of the held-out rows that evaluations during training score; None is all."""
        wanted, held_out = self.config.evaluation.rows_while_training, self.chats.held_out
        if held_out is None or wanted == "auto":
            return None
        return spread(len(held_out), wanted, self.scored_together)

    @property
    def scored_together(self) -> int:
        """How many rows have to be scored together: those of a batch where they decide each other's loss."""
        return 1 if self.objective.alone else int(self.args.per_device_eval_batch_size)

    @cached_property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Tokens of each row that a micro-batch is made of, shape (rows)."""
        return np.asarray(self.objective.row_tokens(row_lengths(self.chats.train, self.engine.fast)))

    @cached_property
    def steps(self) -> Steps:
        """The optimizer steps that the run will take."""
        dealt = self.engine.fast is not None and self.objective.alone
        return count_steps(self.lengths, self.args, self.config.data.streaming, dealt)


def settle(config: RunConfig) -> SettledRun:
    """Check a configuration as a whole: both dictionaries, the objective, the best checkpoint, the data's sources.

    Raises:
        PhinetuneError: what can be said without reading a row.
    """
    config, objective, notes = with_objective_keys(with_adapters_base(config))
    settings = expect_evaluations(read_settings(config.peft_config, config.training_config), config)
    settings = settle_best(replace(settings, notes=[*notes, *settings.notes]), config, objective)
    settings = settle_start(settings, config.model.quantization)
    check_sources(config.data)
    check_replay(config, objective)
    if settings.race and config.data.eval is None:
        raise ConfigError(f"training_config.learning_rate: race: {NO_HELD_OUT}")
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


def as_it_began(settled: SettledRun, start: Mapping[str, Any]) -> tuple[SettledRun, Mapping[str, Any]]:
    """A run that goes on, and what it chose when it began. One of an older version had fixed defaults.

    Where `model.dtype` is auto, the dtype is what it was when the run began, whatever this machine would choose.

    Args:
        start: what its start.json holds.
    """
    settled = in_its_dtype(settled, start)
    if CHOSEN in start:
        return settled, start[CHOSEN] or {}
    return replace(settled, settings=settled.settings.without_auto()), {}


def in_its_dtype(settled: SettledRun, start: Mapping[str, Any]) -> SettledRun:
    """The run in the dtype in which it began, if that was chosen and is not given.

    Args:
        start: what its start.json holds; empty if it has not begun.
    """
    config, began = settled.config, str((start.get("decides") or {}).get("model.dtype", "")).removeprefix("torch.")
    if config.model.dtype != "auto" or not began:
        return settled
    here = str(pick_dtype("auto", pick_device(config.model.device))).removeprefix("torch.")
    note = f"model.dtype: {began}, as the run began; on this machine `auto` would be {here}"
    notes = [*settled.settings.notes, note] if here != began else settled.settings.notes
    model = config.model.model_copy(update={"dtype": began})
    return replace(
        settled,
        config=config.model_copy(update={"model": model}),
        settings=replace(settled.settings, notes=notes),
    )


def prepare_run(settled: SettledRun, recorded: Mapping[str, Any] | None = None) -> PreparedRun:
    """Choose the engine, read and encode the chats, and choose what was left open. Every process of a run calls it.

    Args:
        recorded: of a run that goes on, what it chose when it began, by `section.key`.

    Raises:
        PhinetuneError: anything that would stop the run before its first step, as far as the weights don't matter.
    """
    return with_chosen(prepare_rows(settled), recorded)


def prepare_rows(settled: SettledRun) -> PreparedRun:
    """`prepare_run` up to the rows: what was left open has no numbers yet, and `with_chosen` gives them."""
    config, settings, objective = settled.config, settled.settings, settled.objective
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    with processes.main_first():  # a starter model is made once
        shape, tokenizer = open_config(config.model), open_tokenizer(config.model)
    settings = without_fp16(_limited(settings, shape, dtype, device, config), device, dtype)
    _check_base(config.model, tokenizer, shape)
    config, settings = settle_adapter(config, settings)
    settled = replace(settled, config=config, settings=settings)
    engine = choose_engine(config, settings.training, settings.peft, settings.max_length, dtype, shape)
    _check_engine(objective, engine)
    notes = [
        *_spread_notes(settings, held_as(config.model, shape), engine),
        *_packing_notes(settings, config, engine),
    ]
    settings = replace(settings, notes=[*settings.notes, *notes])
    if engine.fast is None:
        check_plain(settings)
    args = make_training_args(settings, config.output_dir, device, dtype, fast=engine.fast is not None)
    settings = replace(settings, notes=[*settings.notes, *rehearse(settings, args, shape)])
    check_trained_parts(settings, config.model, shape, device, dtype)
    if engine.fast:
        settings = replace(settings, notes=[*settings.notes, *not_for_the_fast_engine(settings)])
    rows = settled.row_encoder(tokenizer)
    chats = with_replay(build_chats(rows), config.model, rows, config.data.replay)
    return PreparedRun(config, settings, objective, device, dtype, shape, engine, args, tokenizer, rows, chats)


def with_chosen(run: PreparedRun, recorded: Mapping[str, Any] | None = None) -> PreparedRun:
    """A run whose rows are prepared, with numbers for what was left open.

    Args:
        recorded: see `prepare_run`.
    """
    run = _chosen(run, recorded or {})
    if run.args.dataloader_drop_last and not run.config.data.streaming:
        check_full_batch(run.lengths, run.args)
    return run


def _limited(
    settings: Settings, shape: ModelConfig, dtype: torch.dtype, device: torch.device, config: RunConfig
) -> Settings:
    """The settings with a `max_length` that the model has positions for; one that is left open fits the memory, too."""
    if "max_length" not in settings.auto:
        return limit_length(settings, shape)
    room = _room(shape, dtype, device, config.engine.kind == "fast")
    cap = length_cap(int(shape.max_position_embeddings), room)
    return replace(settings, training={**settings.training, "max_length": cap})


def _chosen(run: PreparedRun, recorded: Mapping[str, Any]) -> PreparedRun:
    """The run with numbers for what was left open."""
    settings, choices = choose(
        run.settings, _ground(run), lambda made: replace(run, args=_args(run, made)).steps, recorded
    )
    if refused := run.objective.refused(settings.training):  # a batch that was left open has its number now
        raise ConfigError(refused)
    if "peft_config.r" in {choice.key for choice in choices if not choice.given}:
        rehearse(settings, run.args, run.shape)
    config = with_choices(run.config, choices)
    length, training = settings.max_length, settings.training
    engine = choose_engine(config, training, settings.peft, length, run.dtype, run.shape)
    made = replace(run, config=config, settings=settings, engine=engine, choices=choices, recorded=recorded)
    return replace(made, args=_args(made, settings), rows=replace(run.rows, max_length=length))


def _args(run: PreparedRun, settings: Settings) -> SFTConfig:
    return make_training_args(settings, run.config.output_dir, run.device, run.dtype, fast=run.engine.fast is not None)


def _room(shape: ModelConfig, dtype: torch.dtype, device: torch.device, fast: bool) -> int:
    """`room_for_tokens` of the main process: all have to choose alike, and the memory that is free differs."""
    return int(processes.from_main({"tokens": room_for_tokens(shape, dtype, device, fast)})["tokens"])


def _ground(run: PreparedRun) -> Ground:
    train, held_out, section = run.chats.train.report, run.chats.held_out, run.config.evaluation
    streamed, rows = run.config.data.streaming, len(held_out) if held_out else 0
    scored = rows if section.rows_while_training == "auto" else min(rows, section.rows_while_training)
    return Ground(
        hidden=int(run.shape.hidden_size),
        a_rank=parameters_a_rank(run.settings, run.shape),
        room=_room(run.shape, run.dtype, run.device, run.engine.fast is not None),
        processes=max(1, run.args.world_size),
        rate=run.objective.rate,
        least_batch=run.objective.least_batch,
        rows=None if streamed else len(run.lengths),
        longest=int(run.lengths.max(initial=1)),
        trained=train.trainable_tokens,
        held_out=held_out.report.tokens * scored // len(held_out) if held_out else 0,
        held_out_rows=rows if section.rows_while_training == "auto" else None,
        cap=run.settings.max_length or int(run.shape.max_position_embeddings),
        in_one_row=_in_one_row(run),
        wants_evaluations=bool(section.early_stopping_patience or section.metrics_while_training),
    )


def _in_one_row(run: PreparedRun) -> float | None:
    """`share_in_one_row`, where the rules ask for it: of a set that is imitated and neither tiny nor large."""
    if run.config.data.streaming or run.objective.kind != "sft":
        return None
    own = len(run.chats.train) - (run.chats.replay or {}).get("rows", 0)  # the base's answers stand behind them
    least, most = UNLIKE_ROWS
    return share_in_one_row([run.chats.train.encoded[i] for i in range(own)]) if least <= own <= most else None


def _check_base(model: ModelSection, tokenizer: PreTrainedTokenizerBase, shape: ModelConfig) -> None:
    check_vocabulary(tokenizer, shape, model.tokenizer or model.path)
    held_as(model, shape)
    folder = Path(model.path).expanduser()
    if folder.is_dir():  # a hub id's weights are not here yet
        check_checkpoint(folder, shape)


def _spread_notes(settings: Settings, kind: str, engine: EngineChoice) -> list[str]:
    """A line for the log of a run that asks for FSDP.

    Args:
        kind: how the base is held.

    Raises:
        ConfigError: this base can't be spread.
    """
    if not settings.spread:
        return []
    if kind == "int8":
        raise ConfigError(
            "training_config.fsdp: int8 layers of bitsandbytes hold their weights and scales apart from their "
            "parameters, so they can't be spread; take nf4, or a base that is not quantised"
        )
    if kind != "none" and engine.fast is None:
        raise ConfigError(
            f"training_config.fsdp: only the fast engine reads {kind} weights that are spread, and {engine.reason} "
            "needs the plain one"
        )
    if processes.count() == 1:
        return ["training_config: `fsdp` has no effect: there is one process (`phinetune train --nproc N` starts N)"]
    return [f"FSDP2: each of {processes.count()} processes keeps a part of each decoder layer"]


def _packing_notes(settings: Settings, config: RunConfig, engine: EngineChoice) -> list[str]:
    """A line where `data.packing: tokens` and the rest of the configuration do not go together."""
    if config.data.packing != "tokens":
        return []
    if engine.fast is None and not settings.training.get("packing"):
        return [
            "data.packing: `tokens` has no effect: the plain engine takes chats one by one "
            "(`training_config.packing: true` is TRL's own packing)"
        ]
    if settings.training.get("packing") is False:
        return ["training_config: `packing: false` has no effect: data.packing is `tokens`"]
    return []


def _check_engine(objective: Objective, engine: EngineChoice) -> None:
    if engine.fast is None and objective.plain_trainer() is None:
        raise ConfigError(
            f"objective: {objective.kind} trains on the fast engine only, and {engine.reason} needs the plain one"
        )
    if engine.fast and engine.fast.fill and not objective.can_fill:
        raise ConfigError(f"data.packing: {objective.kind} does not fill rows; leave packing at `conversations`")
