"""Training a prepared run: load, adapt, train, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed

from phinetune import processes
from phinetune.checkpoints.device import has_native_bf16
from phinetune.checkpoints.foreign_adapters import peft_folder
from phinetune.checkpoints.load import Loaded, find_base, load_base
from phinetune.checkpoints.target_modules import trainable_parameters
from phinetune.config.run import RunConfig
from phinetune.engine.kept_memory import kept_memory
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.errors import RunError
from phinetune.logs import log_file
from phinetune.run_folder import LOG, RunFolder
from phinetune.secret_text import tree_without_secrets
from phinetune.training.best_checkpoint import EarlyStop
from phinetune.training.callbacks import GradientCheck, MetricsWriter, SamplesWriter, StartRecord, StopRequest
from phinetune.training.environment import describe_environment
from phinetune.training.falling import FallingWarning
from phinetune.training.library_errors import disk_told, told_in_sentences
from phinetune.training.prepare import CHOSEN, PreparedRun
from phinetune.training.recorded import Record, record_of
from phinetune.training.reference import OnDone, Reference
from phinetune.training.resuming import Resumption, check_resume, stretch_of
from phinetune.training.settings import make_lora_config
from phinetune.training.spikes import SpikeWatch, place_of
from phinetune.training.trainer import FastTrainer, Look, RunTrainer
from phinetune.training.value_rules import plain_name
from phinetune.training.warm_start import STARTED_FROM, load_start, started_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlace:
    """Where a run is written, and the checkpoint that it goes on from; None for a run that starts anew.

    Attributes:
        changed: whether a run that goes on may do so with something changed.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    changed: bool = False


def open_place(config: RunConfig, *, resume: bool = False, overwrite: bool = False, changed: bool = False) -> RunPlace:
    """The run's folder, after what a killed process left half done there was finished; else it is not touched.

    Args:
        resume: go on with the run there; `training_config.resume_from_checkpoint` asks for the same.
        changed: go on even though something has changed.

    Raises:
        RunError: a new run may not be written there, or there is none to go on with; or the wishes exclude each other.
    """
    folder, (resume, named) = RunFolder(config.output_dir), _wish(config, resume=resume)
    if changed and not resume:
        raise RunError("--changed (changed=True) is for a run that goes on; give --resume (resume=True) with it")
    if resume and overwrite:
        raise RunError("--resume goes on with the run in output_dir and --overwrite replaces it; give one of them")
    if processes.is_main():
        folder.tidy()
    return _place(folder, resume, named, overwrite=overwrite, changed=changed)


def _wish(config: RunConfig, *, resume: bool) -> tuple[bool, Path | None]:
    """Whether a run goes on, and from which checkpoint if the configuration names one."""
    wish = config.training_config.get("resume_from_checkpoint")
    named = None if str(wish).lower() in ("", "none", "true", "false") else Path(str(wish))
    return resume or named is not None or str(wish).lower() == "true", named


def _place(folder: RunFolder, resume: bool, named: Path | None, *, overwrite: bool, changed: bool) -> RunPlace:
    if resume:
        if not changed:
            folder.check_not_stopped_early()
        return RunPlace(folder, folder.checkpoint_to_resume(named), changed)
    folder.check_free(overwrite)
    return RunPlace(folder)


def refused_place(config: RunConfig) -> str | None:
    """What `open_place` would refuse of the run's folder as it is now, in a sentence; None if nothing.

    Nothing is changed there.
    """
    try:
        _place(RunFolder(config.output_dir), *_wish(config, resume=False), overwrite=False, changed=False)
    except RunError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class TrainedRun:
    """A run that has been trained, or stopped on request before its end.

    Attributes:
        summary: steps, seconds, tokens/s, last loss and sizes, as they go into results.json.
    """

    prepared: PreparedRun
    folder: RunFolder
    loaded: Loaded
    model: PeftModel
    summary: dict[str, Any]
    stopped: bool


def train_run(
    prepared: PreparedRun,
    place: RunPlace,
    *,
    look: Look | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_start: Callable[[PeftModel], None] = lambda model: None,
    on_reference: OnDone = lambda done, total: None,
    stop: StopRequest | None = None,
    loaded: Loaded | None = None,
    on_trainer: Callable[[RunTrainer], None] = lambda trainer: None,
) -> TrainedRun:
    """Train a prepared run into its folder. Of several processes the main one writes.

    Args:
        look: looks at the model at every evaluation.
        callbacks: more callbacks, a progress line for example.
        on_start: is given the model with its adapter before the first step.
        on_reference: is told how many rows the reference has read, and how many there are.
        stop: ends the run before its end; None: signals do.
        loaded: the base if it is in memory already, without an adapter; see `training.candidate.SharedBase`.
        on_trainer: is given the trainer before the first step.

    Raises:
        PhinetuneError: anything a user can mend.
    """
    with processes.main_first():  # also: every process has looked at the folder before the main one writes there
        record = record_of(prepared, (loaded.base if loaded else find_base(prepared.config.model)).fingerprint)
        resumption = _held_against(prepared, place, record)
        loaded = loaded or load_for(prepared)
    _check_same_base(loaded)
    own = _Callbacks.of(prepared, place.folder, stop or StopRequest())
    reference = Reference(prepared, record, on_reference)
    # A stop that is asked for while the reference is computed comes behind the first step.
    with own.stop.listening(), _kept_memory(prepared, loaded):
        trainer = _make_trainer(prepared, loaded, look, own, callbacks, reference)
    facts = _start_facts(trainer, prepared, loaded) | _course(trainer, prepared, record, resumption)
    trainer.add_callback(StartRecord(place.folder, facts, prepared.config, loaded.base.revision))
    if place.checkpoint is None and processes.is_main():
        with disk_told(place.folder.path):
            place.folder.start(prepared.config, loaded.base.revision)
    with log_file(place.folder.path / LOG) if processes.is_main() else nullcontext():
        _log_run(prepared, trainer, loaded)
        on_trainer(trainer)
        on_start(trainer.peft_model)
        began = time.perf_counter()
        with _kept_memory(prepared, loaded):
            _train(trainer, own.stop, place)
    before_its_end = trainer.state.global_step < trainer.state.max_steps
    stopped = own.stop.requested and before_its_end
    summary = _summary(trainer, own, time.perf_counter() - began) | {"changed": facts["changed"]}
    summary["stopped_early"] |= before_its_end and not stopped  # a given callback's wish
    if reference.seconds:
        summary["reference_seconds"] = round(sum(reference.seconds), 2)
    trainer.peft_model.eval()
    return TrainedRun(prepared, place.folder, loaded, trainer.peft_model, summary, stopped)


def _check_same_base(loaded: Loaded) -> None:
    """Make sure that all processes have the same base: they exchange nothing of it.

    Raises:
        RunError: this process has another one than the main process.
    """
    if processes.from_main({"base": loaded.base.fingerprint})["base"] != loaded.base.fingerprint:
        raise RunError(
            f"{loaded.base.path}: the base here is not the main process's; put the same files on all machines"
        )


def load_for(prepared: PreparedRun) -> Loaded:
    """The base of a prepared run, without an adapter."""
    return load_base(prepared.config.model, fast=prepared.engine.fast is not None, tokenizer=prepared.tokenizer)


def _held_against(prepared: PreparedRun, place: RunPlace, record: Record) -> Resumption | None:
    """A run that goes on, held against what it recorded; None for a run that starts anew.

    Raises:
        RunError: something has changed.
    """
    if place.checkpoint is None:
        return None
    return check_resume(place.folder, place.checkpoint, prepared, record, place.changed)


def _course(
    trainer: RunTrainer, prepared: PreparedRun, record: Record, resumption: Resumption | None
) -> dict[str, Any]:
    """What start.json holds for a later `--resume`. A trainer that goes on is told how."""
    if resumption is None:
        return {"changed": [], "stretches": [asdict(stretch_of(record))], "decides": record}
    rows = 0 if prepared.config.data.streaming else len(trainer.train_dataset)  # type: ignore[arg-type]
    trainer.going_on, stretches = resumption.going_on(rows)
    return {
        "changed": list(resumption.changed),
        "stretches": [asdict(one) for one in stretches],
        "decides": resumption.record,
    }


@dataclass(frozen=True)
class _Callbacks:
    """The run's own callbacks, which are asked again afterwards."""

    metrics: MetricsWriter
    samples: SamplesWriter
    spikes: SpikeWatch
    stop: StopRequest
    early: EarlyStop | None
    falling: FallingWarning

    @classmethod
    def of(cls, prepared: PreparedRun, folder: RunFolder, stop: StopRequest) -> _Callbacks:
        section = prepared.config.evaluation
        patience, threshold = section.early_stopping_patience, section.early_stopping_threshold
        early = EarlyStop(patience, threshold) if patience else None
        placed = partial(place_of, prepared.chats.train)
        spikes = SpikeWatch(folder.spikes, lambda ids: str(prepared.tokenizer.decode(ids.tolist())), placed)
        falling = FallingWarning(prepared.objective)
        return cls(MetricsWriter(folder.metrics), SamplesWriter(folder.samples), spikes, stop, early, falling)

    def listed(self) -> list[TrainerCallback]:
        early = [self.early] if self.early else []
        return [self.metrics, GradientCheck(), self.falling, self.stop, self.samples, self.spikes, *early]


def _make_trainer(
    prepared: PreparedRun,
    loaded: Loaded,
    look: Look | None,
    own: _Callbacks,
    more: Sequence[TrainerCallback],
    reference: Reference,
) -> RunTrainer:
    lora = make_lora_config(prepared.settings, loaded.model)
    lora.revision = loaded.base.revision
    metrics, *others = own.listed()
    held_out = prepared.chats.held_out
    shared: dict[str, Any] = {
        "loaded": loaded,
        "args": prepared.args,
        "objective": prepared.objective,
        "eval_dataset": held_out.dataset() if held_out else None,
        "scored": prepared.scored,
        "look": look,
        "samples": own.samples,
        "spikes": own.spikes,
        "started_from": started_from(prepared.config.model),
        "nonfinite": prepared.config.engine,
        "spread": prepared.settings.spread,
        # What shows the numbers comes after what counts them.
        "callbacks": [metrics, *more, *others],
    }
    set_seed(prepared.args.seed)  # the adapter's first weights; TRL before 1.16 draws them unseeded
    with told_in_sentences():  # both libraries check much only now: a tracker that is not installed, odd combinations
        trainer = _fast_or_plain(prepared, loaded, lora, shared, reference)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a raw dictionary
    return trainer


def _fast_or_plain(
    prepared: PreparedRun, loaded: Loaded, lora: LoraConfig, shared: dict[str, Any], reference: Reference
) -> RunTrainer:
    rows, engine = prepared.chats.train.dataset(), prepared.engine.fast
    if engine is None:
        kind: Any = prepared.objective.plain_trainer()
        trainer: RunTrainer = kind(train_dataset=rows, peft_config=lora, **shared)
        _begin(trainer.peft_model, prepared)
        return trainer
    model = get_peft_model(loaded.model, use_fused_layers(lora, loaded.model))
    assert isinstance(model, PeftModel)
    _begin(model, prepared)
    rows, held_out = reference.added(model, engine.prepare(rows), shared.pop("eval_dataset"))
    lengths = None if prepared.config.data.streaming else prepared.lengths
    return FastTrainer(model=model, engine=engine, lengths=lengths, train_dataset=rows, eval_dataset=held_out, **shared)


def _begin(model: PeftModel, prepared: PreparedRun) -> None:
    """Give the adapter the weights that it goes on from, if there are any."""
    if prepared.config.model.adapter:
        load_start(model, peft_folder(prepared.config.model.adapter))


def _start_facts(trainer: RunTrainer, prepared: PreparedRun, loaded: Loaded) -> dict[str, Any]:
    trains, total = trainable_parameters(trainer.peft_model)
    return {
        "base": asdict(loaded.base),
        "data": prepared.chats.facts(),
        CHOSEN: prepared.chosen,
        "settings": [asdict(choice) for choice in prepared.choices],
        "trainable_parameters": trains,
        "parameters": total,
        "environment": describe_environment(trainer.args),
        STARTED_FROM: started_from(prepared.config.model),
    }


def _train(trainer: RunTrainer, stop: StopRequest, place: RunPlace) -> None:
    with disk_told(place.folder.path), told_in_sentences(), stop.listening():
        trainer.train(resume_from_checkpoint=str(place.checkpoint) if place.checkpoint else None)
        trainer.save_final()


def _kept_memory(prepared: PreparedRun, loaded: Loaded) -> AbstractContextManager[Any]:
    """Memory that is kept from step to step, for the fast engine."""
    return kept_memory(loaded.model.device) if prepared.engine.fast else nullcontext()


def _summary(trainer: RunTrainer, own: _Callbacks, seconds: float) -> dict[str, Any]:
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": _mean_loss(trainer),
        "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": round(seconds, 2),
        "tokens_per_s": own.metrics.tokens_per_s,
        "trainable_parameters": trainable_parameters(trainer.peft_model)[0],
        "stopped_early": bool(own.early and own.early.stopped),
        "best": _best(trainer),
        "skipped_steps": trainer.finite.skipped,
    }


def _best(trainer: RunTrainer) -> dict[str, Any] | None:
    """The best evaluation: its metric, value and step; `loaded` where the run's adapter is that step's."""
    state, metric = trainer.state, trainer.args.metric_for_best_model
    if metric is None or state.best_metric is None:
        return None
    loaded = bool(trainer.args.load_best_model_at_end and state.best_model_checkpoint)
    return {
        "metric": metric.removeprefix("eval_"),
        "value": state.best_metric,
        "step": state.best_global_step,
        "loaded": loaded,
    }


def _mean_loss(trainer: RunTrainer) -> float | None:
    """The mean of the logged losses, those before a resume included; not of those with a skipped step."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = [loss for loss in logged if math.isfinite(loss)]
    return sum(losses) / len(losses) if losses else None


def _log_run(prepared: PreparedRun, trainer: RunTrainer, loaded: Loaded) -> None:
    """The guide's log lines: engine, device and precision, all parameters, the share that trains."""
    logger.info(prepared.engine.describe())
    for note in prepared.settings.notes:
        logger.info(note)
    args = trainer.args
    # The engine computes in the weights' dtype, without autocast.
    precision = "bf16" if args.bf16 or loaded.model.dtype == torch.bfloat16 else "fp16" if args.fp16 else "float32"
    logger.info(
        "device: %s, processes: %d, weights: %s, training precision: %s",
        args.device,
        args.world_size,
        loaded.model.dtype,
        precision,
    )
    if args.save_only_model and plain_name(args.save_strategy) != "no":
        logger.warning("save_only_model: checkpoints hold no optimizer, so a stopped run can't go on with --resume")
    if args.bf16 and prepared.engine.fast is None and not has_native_bf16(loaded.device):
        logger.warning("bf16 without the fast engine, on a processor that multiplies it slowly: expect slow steps")
    logger.info("model: %s", prepared.config.model.model_dump())
    logger.info("data: %s", prepared.config.data.model_dump())
    logger.info("objective: %s", prepared.config.objective.model_dump())
    logger.info("training_config: %s", tree_without_secrets(prepared.settings.training))
    logger.info("peft_config: %s", prepared.settings.peft)
    trains, total = trainable_parameters(trainer.peft_model)
    logger.info("trainable parameters: %s of %s (%.3f%%)", f"{trains:,}", f"{total:,}", 100 * trains / total)
