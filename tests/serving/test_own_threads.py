"""A process ends in peace while torch works on a thread that nobody can stop."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from phinetune.serving.own_threads import end_process, on_own_thread

PROGRAM = """
import asyncio, threading, torch
from phinetune.serving.own_threads import end_process, on_own_thread

begun = threading.Event()

def work():
    numbers = torch.empty(10_000)
    begun.set()
    while True:
        numbers.normal_()

async def serve():
    task = asyncio.create_task(on_own_thread(work))
    await asyncio.to_thread(begun.wait)
    task.cancel()

asyncio.run(serve())
print("closed")
end_process()
"""


def test_a_process_ends_while_torch_works() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


def test_results_and_errors_come_back_and_then_nothing_is_left() -> None:
    def fail() -> int:
        raise KeyError("lost")

    assert asyncio.run(on_own_thread(lambda: 7)) == 7
    with pytest.raises(KeyError, match="lost"):
        asyncio.run(on_own_thread(fail))
    end_process()  # this process goes on
