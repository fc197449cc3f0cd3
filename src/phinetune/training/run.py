"""Training a run from its configuration: check everything, then load, adapt, train, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainingArguments, set_seed

from phinetune import processes
from phinetune.chat.encoder import ChatEncoder, make_encoder
from phinetune.checkpoints.adapters import check_base, matched_targets, resolve_targets, trainable_parameters
from phinetune.checkpoints.device import has_native_bf16, pick_device, pick_dtype
from phinetune.checkpoints.load import Loaded, has_packed_form, load_base
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build import Chats, build_chats, check_sources
from phinetune.engine.choice import Engine, why_plain
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.errors import ConfigError, RunError
from phinetune.files import is_disk_full
from phinetune.logs import log_file
from phinetune.run_folder import LOG, RunFolder
from phinetune.screen.preview import preview
from phinetune.screen.progress import ProgressLine
from phinetune.training.best_checkpoint import EarlyStop, needs_answers, settle_best
from phinetune.training.callbacks import GradientCheck, MetricsWriter, SamplesWriter, StartRecord, StopRequest
from phinetune.training.environment import describe_environment
from phinetune.training.settings import Settings, make_lora_config, make_training_args, read_settings
from phinetune.training.trainer import ChatTrainer, Look

logger = logging.getLogger(__name__)

PREVIEWS = 3


@dataclass
class Trained:
    """A run that has been trained, or stopped on request before its end.

    Attributes:
        summary: steps, seconds, tokens/s, last loss and sizes, as they go into results.json.
    """

    folder: RunFolder
    loaded: Loaded
    model: PeftModel
    encoder: ChatEncoder
    chats: Chats
    summary: dict[str, Any]
    stopped: bool


# Makes what looks at the model at every evaluation; told whether it has to count metrics of answers.
Looking = Callable[[Loaded, ChatEncoder, Chats, bool], Look]


def train(
    config: RunConfig,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    looking: Looking | None = None,
) -> Trained:
    """Train `config` into its output_dir. Of several processes the main one prints and writes.

    Raises:
        PhinetuneError: anything a user can mend; found before the model is loaded where that is possible.
    """
    settings = settle_best(read_settings(config.peft_config, config.training_config), config)
    console = _join_others(config, settings, console)
    folder = RunFolder(config.output_dir)
    checkpoint = folder.checkpoint_to_resume(config) if resume else None
    if not resume:
        folder.check_free(overwrite)
    check_sources(config.data)
    if config.data.streaming and int(settings.training.get("max_steps") or -1) < 1:
        raise ConfigError("data.streaming: a stream has no known end, so set training_config.max_steps")
    plain = why_plain(config, settings, pick_dtype(config.model.dtype, pick_device(config.model.device)))
    with processes.main_first():  # also: every process has looked at the folder before the main one writes there
        loaded = load_base(config.model, fast=plain is None)
    if checkpoint:
        check_base(loaded.base, checkpoint)
    encoder = make_encoder(loaded.tokenizer, config.data.loss_on, config.data.system)
    chats = build_chats(config.data, encoder, settings.max_length)
    show_data(chats, loaded, console)
    engine = Engine.of(config, settings) if has_packed_form(loaded.model) else None
    look = looking(loaded, encoder, chats, needs_answers(settings, config.evaluation)) if looking else None
    trainer, callbacks = _make_trainer(settings, config, loaded, chats, engine, look, folder, console)
    if checkpoint is None and processes.is_main():
        folder.start(config, loaded.base.revision)
    trained = Trained(folder, loaded, trainer.peft_model, encoder, chats, {}, False)
    with log_file(folder.path / LOG) if processes.is_main() else nullcontext():
        log_engine(engine, plain)
        log_parameters(config, settings, trainer.args, loaded, trainer.peft_model)
        show_targets(trainer.peft_model, console)
        return _run(trainer, callbacks, checkpoint, trained)


def _join_others(config: RunConfig, settings: Settings, console: Console) -> Console:
    """Meet the other processes of the run; the console to print to, which is a silent one in all but the main one."""
    cpu = pick_device(config.model.device).type == "cpu" or bool(settings.training.get("use_cpu"))
    processes.join(cpu=cpu, timeout_s=settings.step_timeout)
    if processes.is_main():
        return console
    logging.getLogger("phinetune").setLevel(logging.ERROR)
    return Console(quiet=True)


@dataclass(frozen=True)
class Callbacks:
    """The run's own callbacks, where the job needs them afterwards."""

    metrics: MetricsWriter
    progress: ProgressLine
    stop: StopRequest
    early: EarlyStop | None


def _make_trainer(
    settings: Settings,
    config: RunConfig,
    loaded: Loaded,
    chats: Chats,
    engine: Engine | None,
    look: Look | None,
    folder: RunFolder,
    console: Console,
) -> tuple[ChatTrainer, Callbacks]:
    args = make_training_args(settings, folder.path, loaded.device, loaded.model.dtype, fast=engine is not None)
    lora = make_lora_config(settings, resolve_targets(loaded.model, settings.peft.get("target_modules")))
    lora.revision = loaded.base.revision
    rows = chats.train.dataset()
    if engine:
        use_fused_layers(lora, loaded.model)
        rows = engine.prepare(rows)
    set_seed(args.seed)  # the adapter's first weights; TRL before 1.16 draws them unseeded
    patience, threshold = config.evaluation.early_stopping_patience, config.evaluation.early_stopping_threshold
    early = EarlyStop(patience, threshold) if patience else None
    callbacks = Callbacks(MetricsWriter(folder.metrics), ProgressLine(console), StopRequest(), early)
    samples = SamplesWriter(folder.samples)
    try:
        trainer = ChatTrainer(
            loaded=loaded,
            args=args,
            engine=engine,
            train_dataset=rows,
            eval_dataset=chats.held_out.dataset() if chats.held_out else None,
            peft_config=lora,
            look=look,
            samples=samples,
            callbacks=[
                *(callbacks.metrics, callbacks.progress, GradientCheck(), callbacks.stop, samples),
                *([early] if early else []),
            ],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        # Both libraries check much only now: a rank below 1, a tracker that is not installed, odd combinations.
        raise ConfigError(f"PEFT or TRL refuses these settings: {error}") from error
    trainer.remove_callback(PrinterCallback)  # it prints every log as a raw dictionary
    trainer.add_callback(StartRecord(folder, _start_facts(trainer, loaded, chats)))
    return trainer, callbacks


def _start_facts(trainer: ChatTrainer, loaded: Loaded, chats: Chats) -> dict[str, Any]:
    trains, total = trainable_parameters(trainer.peft_model)
    return {
        "base": asdict(loaded.base),
        "data": chats.facts(),
        "trainable_parameters": trains,
        "parameters": total,
        "environment": describe_environment(trainer.args),
    }


def _run(trainer: ChatTrainer, callbacks: Callbacks, checkpoint: Path | None, trained: Trained) -> Trained:
    began = time.perf_counter()
    try:
        with callbacks.stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_final()
    except (OSError, RuntimeError, ValueError) as error:
        if is_disk_full(error):
            raise RunError(
                f"no space is left for {trained.folder.path}: the run stopped; checkpoints written before are "
                "whole. Make room and go on with --resume"
            ) from error
        raise
    finally:
        callbacks.progress.close()
    trained.stopped = callbacks.stop.requested and trainer.state.global_step < trainer.state.max_steps
    trained.summary = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": _mean_loss(trainer),
        "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": round(time.perf_counter() - began, 2),
        "tokens_per_s": callbacks.metrics.tokens_per_s,
        "trainable_parameters": trainable_parameters(trained.model)[0],
        "stopped_early": bool(callbacks.early and callbacks.early.stopped),
        "best": _best(trainer),
    }
    trained.model.eval()
    return trained


def _best(trainer: ChatTrainer) -> dict[str, Any] | None:
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


def _mean_loss(trainer: ChatTrainer) -> float | None:
    """The mean of the logged losses, those before a resume included."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses) / len(losses) if losses else None


def log_engine(engine: Engine | None, why_not: str | None) -> None:
    """One line on how a step is computed."""
    if engine is None:
        logger.info("engine: plain (transformers and PEFT as they are)%s", f": {why_not}" if why_not else "")
        return
    rows = f"rows filled up to {engine.fill} tokens" if engine.fill else "a step's chats in one row"
    shared = "common beginnings computed once" if engine.share else "no sharing of common beginnings"
    logger.info("engine: fast: %s without padding, %s, activation memory %s", rows, shared, engine.activation_memory)


def log_parameters(
    config: RunConfig, settings: Settings, args: TrainingArguments, loaded: Loaded, model: torch.nn.Module
) -> None:
    """The guide's log lines: device and precision, all parameters, the share that trains."""
    for note in settings.notes:
        logger.info(note)
    # The engine computes in the weights' dtype, without autocast.
    precision = "bf16" if args.bf16 or loaded.model.dtype == torch.bfloat16 else "fp16" if args.fp16 else "float32"
    logger.info(
        "device: %s, processes: %d, weights: %s, training precision: %s",
        args.device,
        args.world_size,
        loaded.model.dtype,
        precision,
    )
    if args.bf16 and not has_packed_form(loaded.model) and not has_native_bf16(loaded.device):
        logger.warning("bf16 without the fast engine, on a processor that multiplies it slowly: expect slow steps")
    logger.info("model: %s", config.model.model_dump())
    logger.info("data: %s", config.data.model_dump())
    logger.info("training_config: %s", settings.training)
    logger.info("peft_config: %s", settings.peft)
    trains, total = trainable_parameters(model)
    logger.info("trainable parameters: %s of %s (%.3f%%)", f"{trains:,}", f"{total:,}", 100 * trains / total)


def show_data(chats: Chats, loaded: Loaded, console: Console) -> None:
    """What became of the rows, and the first chats as the model sees them (the trained part told apart)."""
    for made in (chats.train, chats.held_out):
        if made:
            for line in made.report.lines():
                console.print(line, highlight=False, soft_wrap=True)
    marks = not console.is_terminal
    part = "the part in ⟦ ⟧" if marks else "the green part"
    console.print(f"The first chats as the model sees them; {part} is trained on:", highlight=False)
    for row in chats.train.encoded[:PREVIEWS]:
        console.print(preview(loaded.tokenizer, row, marks), highlight=False)


def show_targets(model: PeftModel, console: Console) -> None:
    """A table of the layers that the adapter sits on."""
    console.print("LoRA sits on:", highlight=False)
    table = Table()
    for column in ("layers", "count", "shape (out × in)", "rank", "parameters"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for target in matched_targets(model):
        shape = f"{target.out_features} × {target.in_features}"
        table.add_row(target.name, str(target.count), shape, str(target.rank), f"{target.parameters:,}")
    console.print(table)
