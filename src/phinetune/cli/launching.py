"""`--nproc`: the processes of a run on this machine, started by torchrun's own agent; one message, one exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from phinetune.cli.program import program
from phinetune.errors import MACHINE_FAULT, MachineError, RunError
from phinetune.launched import LAUNCHER, PROGRAM, REPORTS, Report, has_launcher, is_ours, read_reports

# What asks a run to stop goes on to its processes. The agent would end them after half a minute, saved or not.
FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
LEFT_TO_THE_AGENT = "SIGQUIT"
TAIL = 30  # lines of a failed process's own output that are shown where it reported nothing


def launches(count: int) -> bool:
    """Whether this process is the one that starts the others.

    Raises:
        RunError: another launcher has started this process.
    """
    if is_ours() or count == 1:
        return False
    if has_launcher():
        raise RunError(
            "--nproc starts the processes of a run, and a launcher (torchrun, accelerate launch) has started them "
            "already; leave --nproc out"
        )
    return True


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run this command line in `count` processes that train together, and wait for their end.

    The first one shows what it does here; what the others print is kept, for the case that they fail.

    Args:
        arguments: of the command line, without the program.

    Returns:
        the exit status that a run of one process would have.

    Raises:
        RunError: what the processes told, or which of them was ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="phinetune-") as folder, _environment(folder, count), _quiet_agent():
        signals: list[int] = []
        logs = Path(folder) / "logs"
        start = elastic_launch(_agent(count, logs), sys.executable)
        failed: dict[int, Any] = {}
        with _forwarding(signals):
            try:
                start("-m", "phinetune", *arguments)
            except ChildFailedError as error:
                failed = dict(error.failures)
        return _outcome(read_reports(Path(folder)), failed, count, signals, logs)


def _agent(count: int, logs: Path) -> Any:
    """What `torchrun --standalone --nproc-per-node COUNT` sets, but for who prints and what becomes of signals."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=dict.fromkeys(range(1, count), Std.ALL)),
        signals_to_handle=LEFT_TO_THE_AGENT,
    )


@contextmanager
def _environment(folder: str, count: int) -> Iterator[None]:
    """What the processes inherit. Each computes with its share of the cores, unless the user said otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = {REPORTS: folder, LAUNCHER: str(os.getpid()), PROGRAM: program(), "PYTHONSAFEPATH": "1"}
    given["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Show none of the agent's lines: what it has to say is said once, in a sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch's loggers have handlers of their own, one for each part
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _forwarding(signals: list[int]) -> Iterator[None]:
    """Hand signals on to the processes of the run, which save and stop together.

    Args:
        signals: gets their numbers.
    """
    import psutil

    def forward(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        children = psutil.Process().children()
        if not children and number == signal.SIGINT:
            raise KeyboardInterrupt
        for child in children:
            with suppress(psutil.Error):
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED if not _ignored(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _outcome(reports: dict[int, Report], failed: dict[int, Any], count: int, signals: Sequence[int], logs: Path) -> int:
    """The exit status.

    Args:
        failed: what the agent knows of the processes that failed, by rank.
        signals: those that came.

    Raises:
        RunError: what a process told, or which one was ended.
    """
    if not failed:
        return reports[0].status if 0 in reports else 0

    # The first to end is the cause. Of several in one second it is the one that could report nothing, unless it was
    # the agent that ended it, by SIGTERM.
    def order(item: tuple[int, Any]) -> tuple[bool, int, bool, int]:
        rank, failure = item
        by_agent = failure.exitcode == -signal.SIGTERM and not signals
        return by_agent, failure.timestamp, rank in reports, rank

    rank, first = min(failed.items(), key=order)
    if rank in reports:
        # All processes look at the same files, so most errors are told by each: the first one's do.
        told = min(reports.values(), key=lambda one: (one.status == 0, one.lost, bool(one.trace), one.rank))
        if told.trace:
            print(told.trace, file=sys.stderr, end="")
            return 1
        if told.problems:
            raise (MachineError if told.status == MACHINE_FAULT else RunError)(list(told.problems))
        return told.status
    if signals and first.exitcode == -signals[0]:  # it came before the run could listen
        print("stopped", file=sys.stderr)
        return 128 + signals[0]
    why = f"was ended by {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else "ended without a word"
    if first.exitcode == -signal.SIGKILL:
        why += ", which is also what the system does when memory runs out"
    raise RunError(
        [
            f"process {rank + 1} of {count} {why}; the others were ended with it. If there is a checkpoint in the "
            "run's folder, it is whole: go on from it with the same command and --resume",
            *_last_lines(logs, rank),
        ]
    )


def _last_lines(logs: Path, rank: int) -> list[str]:
    """The end of what a process printed to standard error; nothing of the first one, whose output was shown."""
    for file in logs.glob(f"*/attempt_0/{rank}/stderr.log"):
        lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return [f"  {line}" for line in lines[-TAIL:]]
    return []
