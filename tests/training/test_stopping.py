"""A run that is asked to stop, or whose time is over, saves and stops; the run that goes on logs the same lines."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers import tiny_config
from phinetune.config.run import RunConfig, dump_config
from phinetune.training.callbacks import STOP_SIGNALS, StopRequest
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.run import TrainedRun, open_place, train_run

UNLIKE = {"time", "tokens_per_s", "memory", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


@pytest.fixture(autouse=True)
def _signals_as_at_a_terminal() -> Iterator[None]:
    """Under `nohup`, or in the background of a script, SIGINT and SIGHUP are ignored, here and in child processes."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Sends(TrainerCallback):
    """Sends signals to this process inside a step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def run(config: RunConfig, *callbacks: TrainerCallback, resume: bool = False, **more: Any) -> TrainedRun:
    return train_run(prepare_run(settle(config)), open_place(config, resume=resume), callbacks=callbacks, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in UNLIKE} for entry in entries]


@pytest.mark.parametrize("kind", ["fast", "plain"])
@pytest.mark.parametrize(
    ("stop", "training"),
    [
        (7, {"logging_steps": 5}),
        (4, {"logging_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}),
        (7, {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"}),
        (5, {"logging_strategy": "epoch", "eval_strategy": "epoch"}),  # where an epoch ends
        (10, {"logging_strategy": "epoch"}),
        (1, {"logging_steps": 4, "logging_first_step": True}),
    ],
    ids=str,
)
def test_what_is_logged_after_resuming_is_what_the_unbroken_run_logs(
    chats: Path, tmp_path: Path, stop: int, training: dict[str, Any], kind: str
) -> None:
    def config(name: str) -> RunConfig:
        made = tiny_config(chats, tmp_path / name, **{"max_steps": 12, **training})
        made.evaluation.generate = False
        return made.model_copy(update={"engine": made.engine.model_copy(update={"kind": kind})})

    run(config("unbroken"))
    stopped = run(config("stopped"), Sends(stop, signal.SIGTERM))
    assert stopped.stopped
    assert stopped.summary["steps"] == stop
    assert (tmp_path / "stopped" / f"checkpoint-{stop}").is_dir()
    run(config("stopped"), resume=True)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "unbroken")


def test_a_checkpoint_between_two_logged_lines_counts_for_the_next(chats: Path, tmp_path: Path) -> None:
    """A kill after a checkpoint, not a stop: the checkpoint itself holds what was added up."""
    training = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    run(tiny_config(chats, tmp_path / "unbroken", **training))

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(chats, tmp_path / "killed", **training), Killed())
    run(tiny_config(chats, tmp_path / "killed", **training), resume=True)
    assert lines(tmp_path / "killed") == lines(tmp_path / "unbroken")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_that_asks_for_a_stop_saves(chats: Path, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    stopped = run(tiny_config(chats, tmp_path / "run"), Sends(2, number))
    assert stopped.stopped
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(number) is before


def test_what_a_scheduler_sends_after_its_first_signal_does_not_disturb_the_save(chats: Path, tmp_path: Path) -> None:
    first = Sends(2, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    assert run(tiny_config(chats, tmp_path / "run"), first).stopped
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_a_signal_stops_at_once(chats: Path, tmp_path: Path, first: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(chats, tmp_path / "run"), Sends(2, first, signal.SIGINT))
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_a_ctrl_c_while_a_run_stops_for_its_time_is_the_first_one() -> None:
    stop = StopRequest(max_time=0.0)
    with stop.listening():
        stop.requested = True
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_comes_while_processes_ask_one_another_stops_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was lost: what had been asked before it came was the answer, and overwrote it."""
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(epoch=1.0, global_step=3, max_steps=9)
    stop, control = StopRequest(), TrainerControl()
    with stop.listening():

        def ask(wish: bool) -> bool:
            if state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)
            return wish

        monkeypatch.setattr("phinetune.processes.any_of", ask)
        stop.on_step_end(args, state, control)
        assert not control.should_training_stop
        stop.on_epoch_end(args, state, control)
        assert not control.should_save  # this process alone would
        state.global_step = 4
        stop.on_step_end(args, state, control)
    assert control.should_training_stop
    assert control.should_save


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1), (1e-3, 1)])
def test_time_that_is_over_stops_after_the_step(chats: Path, tmp_path: Path, seconds: float, steps: int) -> None:
    stopped = run(tiny_config(chats, tmp_path / "run"), stop=StopRequest(seconds))
    assert (stopped.stopped, stopped.summary["steps"]) == (True, steps)
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir()


def test_time_that_is_enough_stops_nothing(chats: Path, tmp_path: Path) -> None:
    assert not run(tiny_config(chats, tmp_path / "run"), stop=StopRequest(3600.0)).stopped


def test_the_longest_step_and_the_longest_save_are_left_room_for(tmp_path: Path) -> None:
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(epoch=0.3)
    stop, control = StopRequest(max_time=0.35), TrainerControl()
    for seconds, late in ((0.1, False), (0.01, False)):
        stop.on_step_begin(args, state, control)
        time.sleep(seconds)
        stop.on_step_end(args, state, control)
        assert control.should_training_stop is late
    time.sleep(0.1)
    stop.on_save(args, state, control)  # with the step's 0.1 s more than is left
    stop.on_step_begin(args, state, control)
    stop.on_step_end(args, state, control)
    assert control.should_training_stop
    assert control.should_save


# Makes its standard input the terminal that it is controlled by, as a login does, and trains.
IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "phinetune", "train", sys.argv[1]])
"""


def wait_for_steps(run: Path, process: subprocess.Popen[bytes], terminal: int | None = None) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        if terminal is not None and select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
        time.sleep(0.05)


def endless(chats: Path, folder: Path) -> Path:
    file = folder / "run.yaml"
    file.write_text(dump_config(tiny_config(chats, folder / "run", max_steps=100_000)))
    return file


def test_a_run_whose_terminal_is_closed_saves_though_it_can_print_no_more(chats: Path, tmp_path: Path) -> None:
    near, far = pty.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, str(endless(chats, tmp_path))]
    process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, start_new_session=True)
    os.close(far)
    try:
        wait_for_steps(tmp_path / "run", process, near)
    finally:
        os.close(near)  # the system sends SIGHUP, and whatever is printed from here on fails
    assert process.wait(60) == 75
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_a_second_ctrl_c_ends_a_real_process_with_status_130(chats: Path, tmp_path: Path) -> None:
    """The signals of a scheduler end it with 75."""
    command = [sys.executable, "-m", "phinetune", "train", str(endless(chats, tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_steps(tmp_path / "run", process)
    for _ in range(20_000):  # apart from each other: the system keeps one of those that arrive together
        process.send_signal(signal.SIGINT)
        if process.poll() is not None:
            break
        time.sleep(0.002)
    # A third one in the moment before the program ignores them ends it by the signal: 130 to a shell, too.
    assert process.wait(60) in (130, -signal.SIGINT)
