"""Workers end when the process that started them does, even if that one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import write_jsonl
from phinetune.data.prepare import workers

# Three workers that were forked in the context and wait for ever; one that was forked after it.
STARTER = """
import multiprocessing, os, sys, time
from phinetune.data.prepare.workers import ending_with_us
fork = multiprocessing.get_context("fork")
with ending_with_us():
    {start}
outside = fork.Process(target=time.sleep, args=(1000,))
outside.start()
print(*[child.pid for child in fork.active_children() if child is not outside], outside.pid, flush=True)
time.sleep(1000)
"""
STARTS = {
    "processes": "[fork.Process(target=time.sleep, args=(1000,)).start() for _ in range(3)]",
    "a pool without work": "pool = fork.Pool(3)",
    "a manager": "manager = fork.Manager()",
}


def ended(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_end(numbers: list[int], seconds: float = 20.0) -> list[int]:
    """Those that have not ended by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(ended, numbers)):
        time.sleep(0.02)
    return [number for number in numbers if not ended(number)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
@pytest.mark.parametrize("start", STARTS)
def test_workers_end_with_the_process_that_started_them(start: str, end: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER.format(start=STARTS[start])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    *inside, outside = map(int, process.stdout.readline().split())
    assert inside
    process.send_signal(end)
    process.wait(20)
    process.stdout.close()
    try:
        assert wait_for_end(inside) == []
        assert not ended(outside)  # what is none of these workers is left alone
    finally:
        for number in (*inside, outside):
            if not ended(number):
                os.kill(number, signal.SIGKILL)


# The preparation of a large set by three processes. Each tells its number and waits.
PREPARES = """
import sys, time
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import arrow_table
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.read import source_parts
arrow_table.cores, source_parts.PIECE = (lambda: 3), 4
class Waits(RowEncoder):
    def __call__(self, rows):
        open(sys.argv[2] + "/ready", "a").close()
        time.sleep(1000)
encode = Waits(DataSection(train=sys.argv[1]), make_encoder(byte_tokenizer(300)), 90)
from pathlib import Path
arrow_table.write_table(sys.argv[1], encode, Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_while_it_prepares_leaves_no_process(tmp_path: Path) -> None:
    rows = [{"text": f"Once {i}.<|end|>"} for i in range(40)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    process = subprocess.Popen([sys.executable, "-c", PREPARES, str(file), str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) >= 4  # three workers and the manager of their queue
    process.kill()
    process.wait(20)
    process.stderr.close()  # type: ignore[union-attr]
    assert wait_for_end(children) == []


def in_child(task: str) -> int:
    """The exit status of a process that this one starts, after `task`."""
    code = f"import os, time\nfrom phinetune.data.prepare import workers\n{task}\n"
    return subprocess.run([sys.executable, "-c", code], timeout=60).returncode


def test_a_process_whose_parent_has_ended_already_ends_at_once() -> None:
    assert in_child("workers.end_with(os.getppid())") == 0
    assert in_child("workers.end_with(os.getppid() + 1)") == 1


def test_where_the_kernel_sends_nothing_the_parent_is_watched() -> None:
    """As on macOS: a thread of the worker looks at its parent."""
    code = (
        "import os, sys, time\nfrom phinetune.data.prepare import workers\n"
        "workers.LOOKS, sys.platform = 0.05, 'darwin'\n"
        "parent, number = os.getpid(), os.fork()\n"
        "if number == 0:\n    workers.end_with(parent)\n    time.sleep(1000)\n"
        "print(number, flush=True)\ntime.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    child = int(process.stdout.readline())
    assert wait_for_end([child], 0.3) == [child]
    process.kill()
    process.wait(20)
    process.stdout.close()
    assert wait_for_end([child]) == []


def test_the_grandchildren_of_a_worker_are_its_own() -> None:
    """They are not taken for orphans, since their parent is the worker."""
    code = (
        "import os, sys\nfrom phinetune.data.prepare.workers import ending_with_us\n"
        "def ended(number):\n    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])\n"
        "with ending_with_us():\n    worker = os.fork()\n"
        "    if worker == 0:\n        inner = os.fork()\n"
        "        if inner == 0:\n            os._exit(7)\n"
        "        os._exit(ended(inner))\n"
        "print(ended(worker))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == 7
    assert workers._starts_workers_of == []
