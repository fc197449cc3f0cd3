"""What a process knows of its launcher before any library is loaded, and what it reports to `phinetune train --nproc`.

Any launcher (`torchrun`, `accelerate launch`, our own) says in the environment which of a run's processes this one is.
Only the first one shows what all would show alike. Our own launcher also gives a folder for reports: there each process
writes how it ended, and the launcher makes one message and one exit status of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from phinetune.errors import is_lost

REPORTS = "PHINETUNE_REPORTS"  # the folder for reports; only our own launcher sets it
LAUNCHER = "PHINETUNE_LAUNCHER"  # the launcher's process id
PROGRAM = "PHINETUNE_PROGRAM"  # how the user called the launcher
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True)
class Report:
    """How a process ended.

    Attributes:
        rank: which of the run's processes it was, from 0.
        status: its exit status, as a run of one process would have it.
        problems: what went wrong, a sentence each.
        trace: the traceback of an error that nobody foresaw; else empty.
        lost: whether it ended because another process had ended before it.
    """

    rank: int
    status: int
    problems: Sequence[str] = ()
    trace: str = ""
    lost: bool = False


def rank() -> int:
    """Which of the run's processes this is, from 0; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def has_launcher() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_ours() -> bool:
    """Whether `phinetune train --nproc` started this process."""
    return REPORTS in os.environ and has_launcher()


def follow_launcher() -> None:
    """Let this process get SIGTERM when our launcher is gone, however that ended. A run then saves and stops.

    Linux alone can do that; elsewhere the processes of a killed launcher end at their next exchange.
    """
    if not is_ours() or not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it ended before
        sys.exit(1)


def report(status: int, problems: Sequence[str] = (), *, error: BaseException | None = None) -> None:
    """Tell our launcher how this process ends.

    Args:
        error: what ended it; without `problems` one that nobody foresaw.
    """
    trace = "" if problems or error is None else "".join(traceback.format_exception(error))
    text = json.dumps(asdict(Report(rank(), status, tuple(problems), trace, error is not None and is_lost(error))))
    place = Path(os.environ[REPORTS]) / f"{rank()}.json"
    part = place.with_suffix(".partial")
    part.write_text(text, encoding="utf-8")
    part.replace(place)


def read_reports(folder: Path) -> dict[int, Report]:
    """What the processes reported, by rank."""
    found = [Report(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("*.json")]
    return {one.rank: one for one in sorted(found, key=lambda one: one.rank)}
