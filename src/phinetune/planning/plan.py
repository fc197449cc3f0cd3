"""Plans a run: how much memory, time and disk it will take, whether it fits, and what would fit if it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from phinetune.config.run import RunConfig
from phinetune.cpu_share import Company, Usage
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.engine.activation_memory import Level
from phinetune.engine.choice import EngineChoice
from phinetune.planning.disk import checkpoint_bytes, free_disk
from phinetune.planning.evaluations import Evaluations, evaluations_of
from phinetune.planning.fitting_settings import Changes, nearest_fitting
from phinetune.planning.memory import OPTIMIZERS, Parts, optimizer_name
from phinetune.planning.probe import Speed, measure, sample_batch
from phinetune.planning.setup import Need, Setup
from phinetune.training.auto_settings import Choice
from phinetune.training.prepare import PreparedRun, prepare_run, settle
from phinetune.training.race_field import Entry, Wish
from phinetune.training.run import refused_place
from phinetune.training.steps import Steps

SAMPLED = 512  # rows, from which the micro-batch to measure is chosen


@dataclass(frozen=True)
class Plan:
    """What a run will take. With several processes, this is what one of them takes.

    Attributes:
        data: what became of the training rows, as the run reports it.
        parameters: how many parameters base and adapter have; `trainable`: how many the adapter has.
        steps: the optimizer steps.
        memory: bytes at the peak, by part. What the program takes without model and data is not counted.
        free_memory: bytes of memory that are free now.
        layers: how many layers keep all, how many recompute norms and SwiGLU, and how many are recomputed whole.
        seconds: the time of the run without evaluations; None if it was not measured.
        reference_seconds: how much of it the log-probabilities of a reference take, which are computed once before the
            first step; 0 for an objective without one. A run that finds them kept from an earlier one spares this time.
        evaluations: how often held-out chats are scored, how long that takes on top, and what is compared at the end.
        disk: bytes of the adapter and the checkpoints.
        free_disk: bytes that are free where the run will be written.
        fits: whether memory and disk are enough.
        nearest: changes of settings, each of which makes the run fit into memory; empty if it fits or nothing helps.
        notes: what these numbers leave out.
        settings: what was chosen of the settings, with the reasons, and what of the given ones may surprise.
        busy: what other programs took while the time was measured, in a sentence; None if they took nothing.
        refused: what `train` refuses of the run's folder as it is now, in a sentence; None if nothing.
    """

    data: dict[str, Any]
    parameters: int
    trainable: int
    steps: Steps
    memory: Parts
    free_memory: int
    layers: list[int]
    seconds: float | None
    reference_seconds: float | None
    evaluations: Evaluations
    disk: int
    free_disk: int
    fits: bool
    nearest: list[Changes]
    notes: list[str]
    busy: str | None
    settings: list[Choice] = field(default_factory=list)
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory.to_dict()}


def make_plan(config: RunConfig, *, probe: bool = True) -> Plan:
    """Plan a run. Everything is prepared as the run itself does it, but the weights are not loaded.

    Args:
        probe: measure how long a layer takes, to predict the time.

    Raises:
        PhinetuneError: the run itself would stop with this error before it trains.
    """
    return plan_prepared(prepare_run(settle(config)), probe=probe)


def plan_prepared(prepared: PreparedRun, *, probe: bool = True) -> Plan:
    """`make_plan` for a run that has been prepared."""
    setup = Setup.of(prepared)
    need = setup.need()
    before = Usage.now()
    speed = _probe(prepared, setup, need.levels) if probe and prepared.engine.fast else None
    company = Company.between(before, Usage.now()) if speed else None
    disk, room = checkpoint_bytes(setup.args, need.sizes, need.steps), free_disk(prepared.config.output_dir)
    refused = refused_place(prepared.config)
    enough_memory = need.memory.total <= setup.free
    reference = speed.reading(len(need.levels), _reference_tokens(prepared)) if speed else None
    return Plan(
        data=prepared.chats.train.report.to_dict(),
        parameters=need.sizes.parameters,
        trainable=need.sizes.trainable,
        steps=need.steps,
        memory=need.memory,
        free_memory=setup.free,
        layers=[sum(level is kind for level in need.levels) for kind in Level],
        seconds=_seconds(speed, need) + (reference or 0.0) if speed else None,
        reference_seconds=reference,
        evaluations=evaluations_of(prepared, need.steps, speed, len(need.levels)),
        disk=disk,
        free_disk=room,
        fits=enough_memory and disk <= room,
        nearest=[] if enough_memory else nearest_fitting(setup),
        notes=[*_notes(setup, prepared.engine), *_race(prepared), *([refused] if refused else [])],
        busy=busy_sentence(company),
        settings=prepared.choices,
        refused=refused,
    )


def _probe(prepared: PreparedRun, setup: Setup, levels: Sequence[Level]) -> Speed:
    """Measure with some rows of the run that together have about as many tokens as its mean micro-batch."""
    assert prepared.engine.fast
    train = prepared.chats.train
    sample = ChatSet([], train.encoded[:SAMPLED], train.report).dataset()
    rows = prepared.engine.fast.prepare(sample)
    places = sample_batch([len(row["input_ids"]) for row in rows], setup.args.per_device_train_batch_size)
    return measure(prepared, [rows[place] for place in places], levels)


def _seconds(speed: Speed, need: Need) -> float:
    steps = need.steps
    batches = steps.tokens / steps.mean
    return batches * speed.batch(need.levels, steps.mean) + steps.count * speed.a_parameter * need.sizes.trainable


def _reference_tokens(prepared: PreparedRun) -> int:
    """Tokens of all rows whose log-probabilities a reference gives; 0 for an objective without one."""
    if not prepared.objective.reference:
        return 0
    held_out = prepared.chats.held_out
    more = prepared.objective.row_tokens(held_out.lengths()).sum() if held_out else 0
    return int(prepared.lengths.sum() + more)


def busy_sentence(company: Company | None) -> str | None:
    """What a time that was measured beside other programs means; None if there were none."""
    if company is None or not company.disturbs:
        return None
    return f"{company.describe()}: the time was measured beside them, and a quiet machine takes less"


def _race(prepared: PreparedRun) -> list[str]:
    """What a race of learning rates adds to these numbers."""
    return Entry.of(prepared, Wish()).describe() if prepared.settings.race else []


def _notes(setup: Setup, engine: EngineChoice) -> list[str]:
    notes = []
    if engine.reason:
        notes.append(
            f"the run will train without the fast engine ({engine.reason}): padding and whole logits take more memory "
            "than these numbers say, and the time was not measured"
        )
    optimizer = optimizer_name(setup.args)
    if "adamw" not in optimizer and optimizer not in OPTIMIZERS:
        notes.append(f"training_config.optim {optimizer}: its state is counted as if it were AdamW's")
    if setup.config.data.streaming:
        notes.append("the rows are a stream: the lengths are those of its first rows")
    return notes
