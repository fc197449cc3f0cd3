"""A run's plan: what it will take of memory, time and disk, whether that is there, and what would fit if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phinetune.chat.encoder import make_encoder
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.tokenizer import open_config, open_tokenizer
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build import ChatSet, build_chats, check_sources
from phinetune.engine import phi3
from phinetune.engine.choice import Engine, why_plain
from phinetune.engine.memory import Level, free_bytes
from phinetune.planning.disk import checkpoint_bytes, free_disk
from phinetune.planning.memory import OPTIMIZERS, Parts, optimizer_name
from phinetune.planning.nearest import Changes, nearest_fitting
from phinetune.planning.probe import Speed, measure
from phinetune.planning.setup import Need, Setup
from phinetune.planning.steps import Steps, row_lengths, sample_batch
from phinetune.training.settings import make_training_args, read_settings

SAMPLED = 512  # rows among which the micro-batch to measure is looked for


@dataclass(frozen=True)
class Plan:
    """What a run will take, of one process where there are several.

    Attributes:
        data: what became of the training rows, as the run reports it.
        parameters: of base and adapter; `trainable` of the adapter.
        memory: bytes at the peak; the program's own, without model and data, are not counted.
        free_memory: bytes free now, as `free_disk` where the run will be written.
        layers: layers that keep all, that recompute norms and SwiGLU, that are recomputed whole.
        seconds: of training, without evaluations; None where it was not measured.
        disk: bytes of adapter and checkpoints.
        fits: whether memory and disk are enough.
        nearest: changes of which each makes it fit; empty where it fits, or where nothing helps.
        notes: what these numbers leave out.
    """

    data: dict[str, Any]
    parameters: int
    trainable: int
    steps: Steps
    memory: Parts
    free_memory: int
    layers: list[int]
    seconds: float | None
    disk: int
    free_disk: int
    fits: bool
    nearest: list[Changes]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory.to_dict()}


def make_plan(config: RunConfig, *, probe: bool = True) -> Plan:
    """Plan a run: its chats are read and encoded as it will, its weights are not loaded.

    Args:
        probe: measure how long a layer takes.

    Raises:
        PhinetuneError: what the run itself would stop at before it trains.
    """
    setup, engine, train, plain = _set_up(config)
    need = setup.need()
    speed = _probe(setup, engine, train, need.levels) if probe and plain is None else None
    disk, there = checkpoint_bytes(setup.args, need.sizes, need.steps), free_disk(config.output_dir)
    enough = need.memory.total <= setup.free
    return Plan(
        data=train.report.to_dict(),
        parameters=need.sizes.parameters,
        trainable=need.sizes.trainable,
        steps=need.steps,
        memory=need.memory,
        free_memory=setup.free,
        layers=[sum(level is kind for level in need.levels) for kind in Level],
        seconds=_seconds(speed, need) if speed else None,
        disk=disk,
        free_disk=there,
        fits=enough and disk <= there,
        nearest=[] if enough else nearest_fitting(setup),
        notes=_notes(setup, plain),
    )


def _set_up(config: RunConfig) -> tuple[Setup, Engine, ChatSet, str | None]:
    """The run, its engine, its training chats, and what keeps the fast engine from it."""
    settings = read_settings(config.peft_config, config.training_config)
    check_sources(config.data)
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    shape = open_config(config.model)
    plain = why_plain(config, settings, dtype) or phi3.missing_form(shape)
    args = make_training_args(settings, config.output_dir, device, dtype, fast=plain is None)
    encoder = make_encoder(open_tokenizer(config.model), config.data.loss_on, config.data.system)
    train = build_chats(config.data, encoder, settings.max_length).train
    engine = Engine.of(config, settings)
    lengths = row_lengths(train, engine if plain is None else None)
    share = train.report.trainable_tokens / max(1, train.report.tokens)
    return Setup(config, settings, args, dtype, shape, lengths, share, free_bytes(device)), engine, train, plain


def _probe(setup: Setup, engine: Engine, train: ChatSet, levels: Sequence[Level]) -> Speed:
    """Measure with rows of the run that are together about as long as its micro-batches."""
    some = ChatSet([], train.encoded[:SAMPLED], train.report).dataset()
    rows = engine.prepare(some)
    places = sample_batch([len(row["input_ids"]) for row in rows], setup.args.per_device_train_batch_size)
    examples = [rows[place] for place in places]
    return measure(setup.config.model, setup.shape, setup.settings, engine, examples, levels)


def _seconds(speed: Speed, need: Need) -> float:
    steps = need.steps
    batches = steps.tokens / steps.mean
    return batches * speed.batch(need.levels, steps.mean) + steps.count * speed.a_parameter * need.sizes.trainable


def _notes(setup: Setup, plain: str | None) -> list[str]:
    notes = []
    if plain:
        notes.append(
            f"the run will train without the fast engine ({plain}): it takes more memory than said here, for padding "
            "and whole logits, and its time was not measured"
        )
    optimizer = optimizer_name(setup.args)
    if "adamw" not in optimizer and optimizer not in OPTIMIZERS:
        notes.append(f"training_config.optim {optimizer}: its state is counted as AdamW's")
    if setup.config.data.streaming:
        notes.append("the rows are a stream: lengths are those of its first rows")
    return notes
