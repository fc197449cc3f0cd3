"""Callbacks of the trainer: they write metrics and samples, check gradients, and stop the run on request."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
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
            _drop_lines_after(self.path, state.global_step)

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


def _drop_lines_after(path: Path, step: int) -> None:
    """Delete the lines of a JSON Lines file that belong to later steps."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # a crash left this line incomplete
        if entry["step"] <= step:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


class SamplesWriter(TrainerCallback):
    """Appends the answers to the fixed prompts to `samples.jsonl` at each evaluation, one JSON object for each answer.

    When a run is resumed, lines after the checkpoint are deleted, as in `metrics.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            _drop_lines_after(self.path, state.global_step)

    def write(self, state: TrainerState, samples: Sequence[dict[str, Any]]) -> None:
        """Append the answers of this step."""
        if samples and state.is_world_process_zero:
            lines = [json.dumps({"step": state.global_step, **sample}, ensure_ascii=False) for sample in samples]
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
        if self._checked:
            return
        self._checked = True
        grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        if not any(bool(torch.count_nonzero(grad)) for grad in grads):
            raise RunError(
                "the adapter's gradients are all zero at the first step, so it would learn nothing; check what "
                "peft_config.target_modules, layers_to_transform and init_lora_weights leave to train"
            )


class StopRequest(TrainerCallback):
    """On Ctrl-C or SIGTERM the run finishes the step, saves a checkpoint and stops. A second one stops it at once."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.requested = processes.any_of(self.requested)  # so all processes stop after the same step
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """A context that handles both signals. Outside the main thread Python can't do that, and nothing is handled."""
        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._request)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
