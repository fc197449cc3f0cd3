"""Starts the processes of `phinetune.serving.work`, gives them work, and ends them when there is none."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any

from phinetune.errors import PhinetuneError

AT_ONCE = 2  # a plan can take a minute; a file that is uploaded meanwhile is looked at by the second process
IDLE_S = 300.0  # then a process ends, so that its memory is free
TRIES = 2  # of work whose process is killed from outside


class WorkFailed(Exception):
    """The work ended without an answer: its process died, or took too long."""


class ServersFault(PhinetuneError):
    """Nothing that a client can mend: a model on offer can't be used, memory ran out, a disk is full or failed."""


class _Killed(ServersFault):
    """Somebody killed the process: the system where memory runs out, or a person."""


class Workshop:
    """Processes that look at files and plan jobs. All threads may use it."""

    def __init__(self) -> None:
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._places = threading.Semaphore(AT_ONCE)
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def do(self, task: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request; see `phinetune.serving.work`. It waits for a free process.

        Raises:
            ServersFault: what whoever keeps the server can mend.
            PhinetuneError: what a client can mend.
            WorkFailed: the process died, or took longer than `timeout_s`.
        """
        with self._places:
            answer = self._answer({"task": task, **request}, timeout_s)
        if "unexpected" in answer:
            raise WorkFailed(f"{answer['unexpected']}: {answer['problems'][0]}")
        if "problems" in answer:
            raise (ServersFault if "servers" in answer else PhinetuneError)(answer["problems"])
        return dict(answer["done"])

    def _answer(self, request: Mapping[str, Any], timeout_s: float, tries: int = TRIES) -> dict[str, Any]:
        """The answer of a process. Work changes nothing outside of it, so it is done again where it was killed."""
        worker = self._take()
        try:
            answer = worker.ask(request, timeout_s)
        except BaseException as error:
            self._end(worker)
            if isinstance(error, _Killed) and tries > 1:
                return self._answer(request, timeout_s, tries - 1)
            raise
        self._give_back(worker)
        return answer

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed, workers, self._all = True, self._all, []
        for worker in workers:
            worker.end()

    def _take(self) -> _Worker:
        while True:
            try:
                worker = self._free.get_nowait()
            except queue.Empty:
                break
            if worker.wake():
                return worker
            self._end(worker)
        with self._lock:
            if self._closed:
                raise WorkFailed("the server is stopping")
            worker = _Worker()
            self._all.append(worker)
        return worker

    def _give_back(self, worker: _Worker) -> None:
        worker.rest()
        self._free.put(worker)

    def _end(self, worker: _Worker) -> None:
        worker.end()
        with self._lock:
            if worker in self._all:
                self._all.remove(worker)


class _Worker:
    """One process. It is ended from a timer where it has nothing to do."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phinetune.serving.work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for the server, which then ends it
            text=True,
            encoding="utf-8",
        )
        self._timer: threading.Timer | None = None

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        late = threading.Event()
        limit = threading.Timer(timeout_s, self._too_late, [late])
        limit.daemon = True
        limit.start()
        try:
            _pipe(self._process.stdin).write(json.dumps(request) + "\n")
            _pipe(self._process.stdin).flush()
            line = _pipe(self._process.stdout).readline()
        except (OSError, ValueError):  # its pipes are closed, or were closed while it was asked
            line = ""
        finally:
            limit.cancel()
        if not line:
            status = self._process.wait()
            if late.is_set():
                raise WorkFailed(f"it took longer than {timeout_s:g} s")
            if status < 0:
                raise _Killed(f"the process that did it was killed by signal {-status}; memory may have run out")
            raise WorkFailed(f"the process that did it ended with status {status}")
        return dict(json.loads(line))

    def _too_late(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def rest(self) -> None:
        self._timer = threading.Timer(IDLE_S, self.end)
        self._timer.daemon = True
        self._timer.start()

    def wake(self) -> bool:
        """Whether the process is still there to work."""
        if self._timer:
            self._timer.cancel()
        return self._process.poll() is None

    def end(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                _pipe(pipe).close()
            except (OSError, ValueError):
                continue


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
