"""Processes that do a server's long work and outlive it: started in a session of their own, found again, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from phinetune.liveness import is_alive, process_record


def spawn(
    module: str, arguments: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE ARGUMENTS` in a folder. What it prints is added to a log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **(environment or {})},
        )


def called_with(files: Iterable[Path], word: str) -> dict[Path, dict[str, Any]]:
    """The processes whose command line has one of these files, and a word, whoever started them."""
    wanted, found = {str(path): path for path in files}, {}
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        path = next((wanted[one] for one in words if one in wanted), None)
        if path is not None and word in words:
            with suppress(psutil.Error):
                record = process_record(process.info["pid"])
                if is_alive(record):
                    found[path] = record
    return found


def kill(process: Mapping[str, Any]) -> None:
    """End a process and its helpers at once. What it has published stays whole."""
    if is_alive(process):
        with suppress(ProcessLookupError):
            os.killpg(int(process["pid"]), signal.SIGKILL)
