"""Lines and bars that show how far something is: training, a comparison, a look at data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phinetune.cpu_share import Company, Usage
from phinetune.durations import spell_seconds
from phinetune.metric_table import RESERVED
from phinetune.screen.console import say


class TimeLeft(ProgressColumn):
    """Time left from the mean step so far: steady, where rich's own estimate looks at the last seconds only."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("time left —" if left is None else f"{spell_seconds(left)} left", style="cyan")


class Others(ProgressColumn):
    """The other programs that disturb. On a narrow terminal this part is cut, and neither the bar nor the time left."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["busy"], no_wrap=True, overflow="ellipsis")


class ProgressLine(TrainerCallback):
    """Loss, learning rate, tokens/s and time left; a line a log step where there is no terminal.

    It says when other programs take cores away. The time left is then counted from the steps since they began, and
    from those since they ended.
    """

    def __init__(self, console: Console, usage: Callable[[], Usage] = Usage.now) -> None:
        self.console, self._read_usage = console, usage
        self._progress: Progress | None = None
        self._numbers = self._busy = ""
        self._began = 0.0
        self._first_step = 0
        self._usage: Usage | None = None  # None: the run has several processes, which would take each other for others
        self._disturbed = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step
        self._usage = self._read_usage() if args.world_size == 1 else None
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeLeft(),
            Others(),
            console=self.console,
            transient=True,
        )
        self._progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, numbers="", left=None, busy=""
        )
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress:
            self._progress.update(
                self._progress.task_ids[0],
                completed=state.global_step,
                numbers=self._numbers,
                busy=self._busy,
                left=self._seconds_left(state),
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self._numbers, self._busy = spell_logs(logs), self._company(state)
            if self._progress is None:
                left = self._seconds_left(state)
                parts = [self._numbers, self._busy, "" if left is None else f"{spell_seconds(left)} left"]
                line = "  ".join(filter(None, [f"step {state.global_step}/{state.max_steps}", *parts]))
                self.console.print(line, highlight=False, soft_wrap=True)
        elif "eval_loss" in logs:
            place = f"step {state.global_step}/{state.max_steps}"
            self.console.print(f"{place}  held-out {spell_evaluation(logs)}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the line off the terminal; safe to call twice."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _company(self, state: TrainerState) -> str:
        """The other programs since the last log, if they disturb. The steps count anew when that changes."""
        if self._usage is None:
            return ""
        before, self._usage = self._usage, self._read_usage()
        company = Company.between(before, self._usage)
        if company.disturbs != self._disturbed:
            self._disturbed = company.disturbs
            self._began, self._first_step = time.monotonic(), state.global_step
        return f"busy: {company.describe()}" if company.disturbs else ""

    def _seconds_left(self, state: TrainerState) -> float | None:
        done = state.global_step - self._first_step
        if done < 2:
            return None
        return (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)


def spell_evaluation(logs: dict[str, Any]) -> str:
    """The objective's numbers of an evaluation, for one line. Metrics of answers stand in the report."""
    parts = [f"loss {logs['eval_loss']:.4f}"]
    if "eval_token_accuracy" in logs:
        parts.append(f"token accuracy {logs['eval_token_accuracy']:.1%}")
    known = {f"eval_{name}" for name in RESERVED}
    for key, value in logs.items():
        if key.startswith("eval_") and key not in known and isinstance(value, float):
            parts.append(f"{key.removeprefix('eval_').replace('_', ' ')} {value:.4g}")
    return "  ".join(parts)


class ReferenceProgress:
    """How far the reference is: a line where there is no terminal, else a bar with the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` rows have their log-probabilities."""
        if self._progress is None:
            say(self.console, f"Computing the reference's log-probabilities of {total:,} rows, once …")
            columns = (TextColumn("reference"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(
                *columns, console=self.console, transient=True, disable=not self.console.is_terminal
            )
            self._progress.add_task("reference", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar off the terminal; safe to call twice."""
        if self._progress:
            self._progress.stop()
            self._progress = None


class ComparisonProgress:
    """What a comparison is at: a line at its beginning, a bar for each model on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._total = 0

    def __enter__(self) -> ComparisonProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, chats: int, prompts: int, sides: Sequence[str]) -> None:
        self._total = chats + prompts
        named = " and ".join(part for part in (", ".join(sides[:-1]), sides[-1]) if part)
        asked = f" and letting {named} answer {prompts} prompts" if prompts else ""
        say(self.console, f"Scoring {chats} held-out chats{asked} …")

    def side(self, name: str) -> None:
        self._progress.add_task(f"evaluating {name}", total=self._total)

    def advance(self, count: int) -> None:
        self._progress.advance(self._progress.task_ids[-1], count)

    def judging(self, name: str, prompts: int) -> None:
        say(self.console, f"Asking {name} about {prompts} prompts, each in both orders …")
        self._progress.add_task(f"asking {name}", total=prompts)


@contextmanager
def counting_rows(console: Console) -> Iterator[Callable[[], None]]:
    """A count of the rows seen, on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=None)
        yield lambda: progress.advance(task)


def spell_logs(logs: dict[str, Any]) -> str:
    """The numbers of a log step, for one line."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2e}")
    if "rewards/margins" in logs:
        parts.append(f"margin {logs['rewards/margins']:.3f}")
    if "rewards/accuracies" in logs:
        parts.append(f"right {logs['rewards/accuracies']:.0%}")
    if logs.get("tokens_per_s"):
        parts.append(f"{logs['tokens_per_s']:.0f} tokens/s")
    return "  ".join(parts)
