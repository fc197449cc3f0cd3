"""Work in processes beside the server: what becomes of it where such a process is killed, or takes too long."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import TINY, chat
from phinetune.serving.workshop import ServersFault, WorkFailed, Workshop


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    yield made
    made.close()


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(chat(f"Say {i}", f"It is {i}.")) + "\n" for i in range(12)))
    return {"path": str(file), "rows": 100, "model": {"path": TINY}}


def kill_workers(count: int) -> threading.Thread:
    """Kill the next processes that work for this one, each as soon as it is there."""

    def work() -> None:
        killed: set[int] = set()
        until = time.monotonic() + 60
        while len(killed) < count and time.monotonic() < until:
            for process in psutil.Process().children():
                if process.pid not in killed and "phinetune.serving.work" in " ".join(process.cmdline()):
                    killed.add(process.pid)
                    process.kill()
            time.sleep(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_work_whose_process_is_killed_is_done_again(workshop: Workshop, request_: dict[str, Any]) -> None:
    killer = kill_workers(1)
    found = workshop.do("check", request_, 120)
    killer.join()
    assert (found["rows"], found["problems"]) == (12, [])


def test_work_that_is_killed_again_is_the_machines_fault(workshop: Workshop, request_: dict[str, Any]) -> None:
    """A job then pauses, and nothing of it is lost."""
    killer = kill_workers(2)
    with pytest.raises(ServersFault, match="killed by signal 9"):
        workshop.do("check", request_, 120)
    killer.join()


def test_work_that_takes_too_long_is_not_done_again(workshop: Workshop, request_: dict[str, Any]) -> None:
    with pytest.raises(WorkFailed, match=r"longer than 0\.2 s"):
        workshop.do("check", request_, 0.2)


def test_a_server_that_stops_ends_the_work(workshop: Workshop, request_: dict[str, Any]) -> None:
    closer = threading.Timer(0.5, workshop.close)
    closer.start()
    with pytest.raises(WorkFailed, match="the server is stopping"):
        workshop.do("check", request_, 120)
    closer.join()
