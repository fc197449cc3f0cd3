"""Records which process a run belongs to, and finds out whether that process still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """What identifies this process: its host, its id, and the time it began in seconds, because ids are used again."""
    return process_record(os.getpid())


def process_record(pid: int) -> dict[str, Any]:
    """What identifies a process of this host, as `this_process` returns it.

    Raises:
        psutil.Error: there is none.
    """
    return {"host": socket.gethostname(), "pid": pid, "began": psutil.Process(pid).create_time()}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process still runs on this host. One that has ended and waits for its parent to notice doesn't.

    Args:
        process: what `this_process` returned in that process.
    """
    try:
        found = psutil.Process(int(process["pid"]))
        same = abs(found.create_time() - float(process["began"])) < 1
        return is_on_this_host(process) and same and found.status() != psutil.STATUS_ZOMBIE
    except (KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return False


def is_on_this_host(process: Mapping[str, Any]) -> bool:
    """Whether a process was started on this host, so that `is_alive` can tell."""
    return process.get("host") == socket.gethostname()


def named(process: Mapping[str, Any]) -> str:
    """A process in words: its id, its host, and since when it runs."""
    try:
        began = f", begun {datetime.fromtimestamp(float(process['began'])):%Y-%m-%d %H:%M:%S}"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        began = ""
    return f"process {process.get('pid')} on {process.get('host')}{began}"
