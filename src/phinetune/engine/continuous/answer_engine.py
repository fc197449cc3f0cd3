"""An engine that answers requests from any thread, on a thread of its own. One base in memory, many adapters on it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phinetune.engine.continuous.batch import Batch, Row
from phinetune.engine.continuous.low_rank import Adapter
from phinetune.engine.continuous.requests import AnswerStream, Busy, Ended, Event, Request, TooLong
from phinetune.engine.device_memory import free_bytes

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.25  # the share of the free memory that keys and values may take
MOST_ROWS = 64  # conversations that are answered together
MOST_WAITING = 128  # conversations that wait besides


@dataclass(frozen=True)
class Load:
    """What an engine does at a moment: conversations by their state, and what it has done so far.

    Attributes:
        cache_bytes: of keys and values.
        answered_tokens: tokens of all answers.
        read_tokens: tokens of prompts that were computed.
        reused_tokens: tokens of prompts that another conversation had begun with.
        kept_tokens: tokens whose keys and values are kept of conversations that have ended.
        steps, busy_s: steps, and the seconds that they took; `answered_tokens` for `busy_s` is the rate under load.
    """

    waiting: int
    reading: int
    answering: int
    cache_bytes: int
    answered_tokens: int
    read_tokens: int = 0
    reused_tokens: int = 0
    kept_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0

    @property
    def conversations(self) -> int:
        return self.waiting + self.reading + self.answering


class AnswerEngine:
    """Answers many conversations at once.

    Attributes:
        room: how many tokens a conversation may have, its answer included.
    """

    def __init__(
        self,
        core: Any,
        *,
        most_rows: int = MOST_ROWS,
        most_waiting: int = MOST_WAITING,
        cache_bytes: int | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
            core: a model with a packed form, in evaluation mode and without adapters.
            most_rows: how many conversations are answered together.
            most_waiting: how many may wait besides.
            cache_bytes: what keys and values may take. None: a quarter of the memory that is free now.
        """
        self._adapters: dict[str, Adapter] = {}
        self._leaving: set[str] = set()  # adapters that are to be dropped
        self._most = most_rows + most_waiting
        most_bytes = int(CACHE_SHARE * free_bytes(core.device)) if cache_bytes is None else cache_bytes
        self._batch = Batch(core, self._adapters, most_rows, most_bytes)
        self.room = self._batch.room
        self._lock = threading.Condition()
        self._inbox: deque[Row] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._closed = False
        self._steps, self._busy_s = 0, 0.0
        self._load = Load(0, 0, 0, 0, 0)
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """From now on, requests may name this adapter, even if it was to be dropped."""
        with self._lock:
            self._leaving.discard(name)
            self._adapters[name] = adapter

    def has_adapter(self, name: str) -> bool:
        return name in self._adapters

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter once the requests that name it have ended, unless it is added again before."""

        def drop() -> None:
            if name not in self._leaving:
                return
            rows = (*self._batch.waiting, *self._batch.reading, *self._batch.answering)
            if any(row.request.adapter == name for row in rows):
                self._jobs.append(drop)
            else:
                self._leaving.discard(name)
                self._adapters.pop(name, None)
                self._batch.store.drop_adapter(name)

        with self._lock:
            self._leaving.add(name)
            self._jobs.append(drop)
            self._lock.notify()

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> AnswerStream:
        """Ask for an answer.

        Args:
            listener: gets the events, on the engine's thread. None: they are read from the stream.

        Raises:
            Busy: too many requests wait.
            TooLong: the prompt leaves no room for an answer.
            KeyError: there is no such adapter.
        """
        if request.adapter is not None and request.adapter not in self._adapters:
            raise KeyError(request.adapter)
        if not request.prompt or len(request.prompt) >= self.room:
            raise TooLong(len(request.prompt), self.room)
        if len(request.prompt) + request.max_new > self.room:
            raise TooLong(len(request.prompt) + request.max_new, self.room)
        stream = AnswerStream(listener)
        stream.on_cancel = self._wake
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self._inbox) + self._load.conversations >= self._most:
                raise Busy(f"{self._most} requests are answered or wait already")
            self._inbox.append(Row(request, stream))
            self._lock.notify()
        return stream

    @property
    def load(self) -> Load:
        """What the engine does now."""
        with self._lock:
            return Load(**{**vars(self._load), "waiting": self._load.waiting + len(self._inbox)})

    def close(self) -> None:
        """End all answers as cancelled, and the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    # -- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        busy = False
        while self._take_in(wait=not busy):
            began = time.perf_counter()
            try:
                busy = self._batch.step()
            except Exception as error:  # whatever it is, others must be answered
                logger.exception("a step of the answering engine failed")
                self._batch.fail(error)
                busy = True
            if busy:
                self._steps += 1
                self._busy_s += time.perf_counter() - began
        self._batch.end_all("cancelled")

    def _take_in(self, *, wait: bool) -> bool:
        """Take over what has come since the last step. Returns False once the engine is closed."""
        with self._lock:
            self._note_load()
            if wait and not (self._inbox or self._jobs or self._closed):
                self._lock.wait(timeout=None if not self._batch.waiting else 0.05)
            for _ in range(len(self._jobs)):
                self._jobs.popleft()()
            while self._inbox:
                self._batch.add(self._inbox.popleft())
            self._note_load()
            return not self._closed

    def _note_load(self) -> None:
        batch = self._batch
        self._load = Load(
            waiting=len(batch.waiting),
            reading=len(batch.reading),
            answering=len(batch.answering),
            cache_bytes=batch.bytes,
            answered_tokens=batch.taken,
            read_tokens=batch.read,
            reused_tokens=batch.reused,
            kept_tokens=batch.store.bytes // batch.layout.token_bytes,
            steps=self._steps,
            busy_s=self._busy_s,
        )


__all__ = ["AnswerEngine", "Busy", "Ended", "Load", "TooLong"]
