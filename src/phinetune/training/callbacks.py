"""Callbacks of the trainer: they write metrics and samples, check gradients, and stop the run on request or in time."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune import processes
from phinetune.config.run import RunConfig
from phinetune.engine.device_memory import used_bytes
from phinetune.errors import RunError
from phinetune.files import PRIVATE, write_lines
from phinetune.liveness import this_process
from phinetune.run_folder import RunFolder


class MetricsWriter(TrainerCallback):
    """Appends one JSON object to `metrics.jsonl` at each log step and at each evaluation.

    It also counts tokens per second, without the time of evaluations and saving, and looks up how much memory is taken.
    When a run is resumed, lines after the checkpoint are deleted, because those steps are done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock = 0.0
        self._seen = 0
        self.tokens_per_s: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restart(state)
        if state.is_world_process_zero:
            drop_lines_after(self.path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return  # this is the summary at the end of training
        if "loss" in logs:
            self._count(logs, state)
            logs["memory"] = used_bytes(args.device)
        if state.is_world_process_zero:
            place = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 1)}
            self._append({**place, **_entry(logs)})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restart(state)

    on_save = on_evaluate

    def _count(self, logs: dict[str, Any], state: TrainerState) -> None:
        seconds, tokens = time.perf_counter() - self._clock, int(state.num_input_tokens_seen) - self._seen
        if tokens > 0 and seconds > 0:
            self.tokens_per_s = round(tokens / seconds, 2)
        logs["tokens"] = int(state.num_input_tokens_seen)
        logs["tokens_per_s"] = self.tokens_per_s
        self._restart(state)

    def _restart(self, state: TrainerState) -> None:
        self._clock, self._seen = time.perf_counter(), int(state.num_input_tokens_seen)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def drop_lines_after(path: Path, step: int) -> None:
    """Delete the lines of a JSON Lines file that belong to later steps, and lines that a crash left incomplete."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # texts hold other breaks of lines
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_lines(path, kept)


class SamplesWriter(TrainerCallback):
    """Appends the answers to the fixed prompts to `samples.jsonl` at each evaluation, one JSON object for each answer.

    When a run is resumed, lines after the checkpoint are deleted, as in `metrics.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            drop_lines_after(self.path, state.global_step)

    def write(self, state: TrainerState, samples: Sequence[dict[str, Any]]) -> None:
        """Append the answers of this step."""
        if samples and state.is_world_process_zero:
            lines = [json.dumps({"step": state.global_step, **sample}, ensure_ascii=False) for sample in samples]
            self.path.touch(PRIVATE)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))


# Entries of transformers' and TRL's logs that are not written: the same numbers under other names, and times that
# include the set-up.
UNUSED = {"epoch", "num_tokens", "num_input_tokens_seen", "train_runtime", "train_tokens_per_second"}


def _entry(logs: dict[str, Any]) -> dict[str, Any]:
    """The entry to write. JSON has no NaN or infinity, so null replaces them."""
    return {
        key.replace("mean_token_accuracy", "token_accuracy"): None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in logs.items()
        if key not in UNUSED
    }


class StartRecord(TrainerCallback):
    """Writes start.json once the number of steps is known. The report of an unfinished run is made from it.

    Of a run that goes on, config.yaml is written again too, since settings may have changed. Up to here nothing in the
    folder was touched.
    """

    def __init__(self, folder: RunFolder, facts: dict[str, Any], config: RunConfig, revision: str | None) -> None:
        self.folder, self.facts, self.config, self.revision = folder, facts, config, revision

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.folder.write_config(self.config, self.revision)
            self.folder.write_start({**self.facts, "steps": state.max_steps, "process": this_process()})


class GradientCheck(TrainerCallback):
    """Stops a run if the adapter gets no gradient at the first step. The run would take hours and learn nothing."""

    def __init__(self) -> None:
        self._checked = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if self._checked or args.deepspeed:  # DeepSpeed has taken the step by now, and let the gradients go
            return
        self._checked = True
        grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        if not any(bool(torch.count_nonzero(grad)) for grad in grads):
            raise RunError(
                "the adapter's gradients are all zero at the first step, so it would learn nothing; check what "
                "peft_config.target_modules, layers_to_transform and init_lora_weights leave to train"
            )


# What asks a run to stop. SIGUSR1 is what Slurm sends before its time limit (`--signal=USR1@120`). A platform that
# lacks one of them can't send it.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest(TrainerCallback):
    """On one of `STOP_SIGNALS`, and before `max_time` is over, the run finishes its step, saves and stops.

    A Ctrl-C after that stops it at once. Other signals after the first are what schedulers send until the run is gone.

    Attributes:
        requested: whether the run is to stop.
    """

    def __init__(self, max_time: float | None = None, began: float | None = None) -> None:
        """Make one for a run.

        Args:
            max_time: seconds; None is no limit.
            began: `time.monotonic()` of when they began; None is now.
        """
        self.requested, self._signalled = False, False
        self._terminals: list[int] = []
        self._deadline = None if max_time is None else (time.monotonic() if began is None else began) + max_time
        self._clock = time.monotonic()
        self._longest = {"step": 0.0, "save": 0.0}  # seconds that one took so far

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._took("step")
        # So all stop after the same step. A signal that comes while they ask one another counts at the next step.
        asked = self._signalled or self.requested or self.is_asked_elsewhere()
        self.requested = processes.any_of(asked or self._is_late())
        if self.requested:
            control.should_training_stop = True
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where the run stops inside an epoch, nothing is done that belongs to the epoch's end.

        At the epoch's end it is saved again, after what is logged and evaluated there. A signal that came since the
        last step is for the next one: the other processes do not know of it yet.
        """
        if self.requested and control.should_training_stop and state.global_step < state.max_steps:
            whole = _ends_an_epoch(state)
            control.should_log &= whole
            control.should_evaluate &= whole
            control.should_save = whole
            self._clock = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._took("save")

    def _took(self, what: str) -> None:
        """Keep the time since the last look, if it is the longest one."""
        now = time.monotonic()
        self._longest[what], self._clock = max(self._longest[what], now - self._clock), now

    def is_asked_elsewhere(self) -> bool:
        """Whether the run is asked to stop by other means than a signal; looked at after each step."""
        return False

    def _is_late(self) -> bool:
        """Whether one more step and a checkpoint might not end in time."""
        return self._deadline is not None and time.monotonic() + sum(self._longest.values()) >= self._deadline

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self._signalled = True
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal(self._terminals)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """A context that handles the signals. Outside the main thread Python can't do that, and nothing is handled.

        A signal that is ignored, as `nohup` ignores SIGHUP, stays ignored.
        """
        before: dict[int, Any] = {}
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        try:
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._request)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Pause(StopRequest):
    """Stops a candidate of a race after a given step, and otherwise as the race itself is stopped.

    Attributes:
        paused: whether the candidate came to that step.
    """

    def __init__(self, race: StopRequest, at: int, before: Callable[[int], None] | None = None) -> None:
        """Make one for a stretch of a candidate.

        Args:
            race: what stops the race.
            at: the step.
            before: is called with the step, before the checkpoint is written there.
        """
        super().__init__()
        self.race, self.at, self.before, self.paused = race, at, before, False
        self._deadline = race._deadline

    def is_asked_elsewhere(self) -> bool:
        return self.race.is_asked_elsewhere()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_step_end(args, state, control)
        if self.requested:  # a signal, or the end of the time
            self.race.requested = True
        if state.global_step == self.at:
            if self.before:
                self.before(state.global_step)
            self.paused = self.requested = True
            control.should_training_stop = control.should_save = True

    @property
    def asked(self) -> bool:
        """Whether a signal or the end of the time asked the race to stop."""
        return self.race.requested or self._signalled


def _ends_an_epoch(state: TrainerState) -> bool:
    return float(state.epoch or 0.5).is_integer()


def _leave_terminal(outputs: Sequence[int]) -> None:
    """Let what is printed go nowhere: the terminal is gone, and writing to it would end the run before it is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in outputs:
        os.dup2(nowhere, number)
    os.close(nowhere)
