"""Records which process a run belongs to, and finds out whether that process still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """What identifies this process: its host, its id, and the time it began in seconds, because ids are used again."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process still runs on this host.

    Args:
        process: what `this_process` returned in that process.
    """
    try:
        began = psutil.Process(int(process["pid"])).create_time()
        return process["host"] == socket.gethostname() and abs(began - float(process["began"])) < 1
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False
