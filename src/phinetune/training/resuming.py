"""Holds a run that is to go on against what it recorded: the same, changed without harm, or changed.

What decides the result has to be the same. A difference is refused, or taken knowingly with `--resume --changed`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from phinetune.errors import RunError
from phinetune.run_folder import RunFolder
from phinetune.training.going_on import GoingOn
from phinetune.training.older_runs import record_of_older
from phinetune.training.prepare import PreparedRun
from phinetune.training.recorded import HELD_OUT_ROWS, STARTING_ADAPTER, TOKENIZER, TRAIN_ROWS, WEIGHTS, Record
from phinetune.training.resume_tables import ORDER, STEP_SIZE, counts_for_the_best, is_harmless, why_never
from phinetune.training.row_place import Stretch

logger = logging.getLogger(__name__)

BY_CONTENT = (TRAIN_ROWS, HELD_OUT_ROWS, TOKENIZER, WEIGHTS, STARTING_ADAPTER)
ROWS = ("data.", "training_config.max_length")  # the keys that rows come of


@dataclass(frozen=True)
class Difference:
    """A key of the record, the value that the run has, and the one that it would go on with."""

    key: str
    before: Any
    now: Any

    def sentence(self) -> str:
        """The difference in words."""
        if self.key in BY_CONTENT:
            return f"{self.key}: {_short(self.before)} when the run began, now {_short(self.now)}"
        return f"{self.key}: the run has {_shown(self.before)}, the configuration now has {_shown(self.now)}"

    def brief(self) -> str:
        """The difference in a few words, for the card."""
        name = self.key.removeprefix("training_config.")
        return f"{name} changed" if self.key in BY_CONTENT else f"{name} {_shown(self.before)} → {_shown(self.now)}"


def _short(digest: Any) -> str:
    return "none" if digest is None else f"SHA-256 {str(digest)[:12]}…"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Resumption:
    """A run that goes on.

    Attributes:
        step: of the checkpoint.
        epochs: how many of them were whole by then.
        record: what decides its result from here on.
        differences: what has changed since the checkpoint was written, and counts.
        changed: all changes of the run in order: at which step, and what, in a few words.
        stretches: the parts of the run up to here; the first one begins at step 0.
    """

    step: int
    epochs: int
    record: Record
    differences: Sequence[Difference]
    changed: Sequence[dict[str, Any]]
    stretches: Sequence[Stretch]

    def going_on(self, rows: int) -> tuple[GoingOn, list[Stretch]]:
        """How the trainer goes on, and the parts of the run with the one that begins now.

        Args:
            rows: of an epoch, as the trainer counts them.
        """
        keys = {key for entry in self.changed if entry["step"] == self.step for key in entry["keys"]}
        forget = bool(keys & {HELD_OUT_ROWS, TOKENIZER}) or any(map(counts_for_the_best, keys))
        stretches, last = list(self.stretches), self.stretches[-1]
        changed_now = {one.key for one in self.differences} | (keys if last.step < self.step else set())
        if changed_now & (ORDER | STEP_SIZE):
            stretches.append(self._next(last, keys, rows))
        elif len(stretches) == 1:
            return GoingOn(None, bool(self.changed), forget), stretches
        epoch, row = stretches[-1].place_at(self.step, rows)
        place = dataclasses.replace(stretches[-1], step=self.step, epoch=epoch, row=row)
        return GoingOn(place, bool(self.changed), forget), stretches

    def _next(self, last: Stretch, keys: set[str], rows: int) -> Stretch:
        """The part that begins now. Where the rows come in another order, their epoch begins again."""
        again = keys & ORDER or not _same_order_every_time(self.record)
        epoch, row = (self.epochs, 0) if again else last.place_at(self.step, rows)
        return dataclasses.replace(stretch_of(self.record), step=self.step, epoch=epoch, row=row)


def _same_order_every_time(record: Record) -> bool:
    """Whether the order of an epoch's rows depends on nothing but seed and epoch."""
    seedable = (record.get("training_config.accelerator_config") or {}).get("use_seedable_sampler", True)
    by_length = record.get("training_config.train_sampling_strategy") == "group_by_length"
    return seedable and not by_length and not record.get("training_config.ignore_data_skip")


def stretch_of(record: Record) -> Stretch:
    """A run from its beginning, in steps of the recorded size."""
    return Stretch(
        *(0, 0, 0),
        int(record["training_config.per_device_train_batch_size"]) * int(record["processes.number"]),
        int(record["training_config.gradient_accumulation_steps"]),
        bool(record.get("training_config.dataloader_drop_last")),
    )


def check_resume(folder: RunFolder, checkpoint: Path, prepared: PreparedRun, now: Record, changed: bool) -> Resumption:
    """Hold a run that is to go on against what it recorded. Nothing is touched.

    Args:
        now: what decides the result of the run as it would go on.
        changed: whether differences are taken knowingly.

    Raises:
        RunError: something that decides the result differs; the error lists all of it.
    """
    start = folder.read_start()
    recorded = start.get("decides")
    before = recorded if isinstance(recorded, dict) else record_of_older(folder, checkpoint, prepared, start)
    differences = _differences(before, now)
    counted = [one for one in differences if not is_harmless(one.key, before, now)]
    if _same_steps(before, now, prepared):
        counted = [one for one in counted if one.key not in STEP_SIZE]
    _refuse(folder, [one for one in counted if why_never(one.key, before, now)] if changed else counted, before, now)
    for one in differences:
        if one not in counted:
            logger.info("%s; what is trained stays the same", one.sentence())
    if prepared.chats.train.stream is not None:
        logger.info(
            "a stream is compared by its first %d rows; the others are taken as they come", len(prepared.chats.train)
        )
    missing = [key for key in now if key not in before]
    if missing:
        logger.warning("not compared, since the run recorded nothing of it: %s", ", ".join(missing))
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    step = state.global_step
    # What was changed after this checkpoint, in steps that are gone, is in force from here on.
    history = [{**entry, "step": min(entry["step"], step)} for entry in start.get("changed") or []]
    if counted:
        texts = [one.brief() for one in counted]
        history.append({"step": step, "what": texts, "keys": [one.key for one in counted]})
        logger.warning("resumed with something changed at step %d: %s", step, ", ".join(texts))
    begun = [Stretch(**part) for part in start.get("stretches") or [] if part["step"] <= step]
    return Resumption(step, int(state.epoch or 0), now, counted, history, begun or [stretch_of(before)])


def _same_steps(before: Record, now: Record, prepared: PreparedRun) -> bool:
    """Whether another number of processes takes the same steps: of as many rows, whichever process computes which."""
    numbers = [record.get("processes.number") for record in (before, now)]
    if None in numbers or numbers[0] == numbers[1] or prepared.config.data.streaming or not prepared.objective.alone:
        return False
    one, other = stretch_of(before), stretch_of(now)
    return one.step_rows == other.step_rows and not (one.drop_last or other.drop_last)


def what_differs(before: Record, now: Record) -> list[str]:
    """In sentences what differs between two records and decides the result."""
    return [one.sentence() for one in _differences(before, now) if not is_harmless(one.key, before, now)]


def _differences(before: Record, now: Record) -> list[Difference]:
    """Where two records differ. A key that only one of them has is not compared, but for versions."""
    keys = [key for key in {**before, **now} if (key in before and key in now) or key.startswith("versions.")]
    found = [Difference(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
    return sorted(found, key=lambda one: one.key in BY_CONTENT)


def _refuse(folder: RunFolder, refused: Sequence[Difference], before: Record, now: Record) -> None:
    if not refused:
        return
    problems = []
    for one in refused:
        why = why_never(one.key, before, now)
        problems.append(one.sentence() + (f" (not even --changed takes this: {why})" if why else ""))
    if {TRAIN_ROWS, HELD_OUT_ROWS} & {one.key for one in refused}:
        causes = [one for one in _differences(before, now) if one.key.startswith(ROWS) and one not in refused]
        problems += [f"the rows may differ by this: {one.sentence()}" for one in causes]
    rule = (
        f"--resume goes on with the run in {folder.path} as it began; set these values back, take the differences "
        "knowingly with --resume --changed, or start a new run"
    )
    raise RunError([*problems, rule])
