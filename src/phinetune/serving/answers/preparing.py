"""Makes requests ready for the engine beside all other work: a base that loads holds up nobody who does not want it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from phinetune.serving.answers.answerer import Answerer, Finder
from phinetune.serving.errors import too_many
from phinetune.serving.own_threads import on_own_thread

AT_ONCE = 8  # requests whose chats are made token ids; the rest of a moment's requests wait
RETRY_S = 5  # a base takes seconds to load

Find = Callable[[str], Answerer]
Work = TypeVar("Work")


class NotLoaded(Exception):
    """A model has to be loaded first."""

    def __init__(self, model_id: str) -> None:
        super().__init__(model_id)
        self.model_id = model_id


class Preparing:
    """Prepares requests, and loads the models that they want. For one event loop."""

    def __init__(self, answerers: Finder, most_waiting: int) -> None:
        """Begin with none.

        Args:
            most_waiting: requests that may wait until their model is loaded.
        """
        self._answerers, self._most = answerers, most_waiting
        self._waiting = 0
        self._turn = asyncio.Lock()  # one is loaded at a time, so one thread is enough for all who wait
        self._threads = CapacityLimiter(AT_ONCE)  # the server's other endpoints share a limit of their own

    async def do(self, prepare: Callable[[Find], Work]) -> Work:
        """What a function makes of a request.

        Args:
            prepare: is called with what finds the model; once more if that has to be loaded first.

        Raises:
            ApiError: as the function, or as the model's loading; or too many wait for that already.
        """
        try:
            return await to_thread.run_sync(prepare, self._in_memory, limiter=self._threads)
        except NotLoaded as missing:
            answerer = await self._loaded(missing.model_id)
        return await to_thread.run_sync(prepare, lambda _: answerer, limiter=self._threads)

    def _in_memory(self, model_id: str) -> Answerer:
        answerer = self._answerers.in_memory(model_id)
        if answerer is None:
            raise NotLoaded(model_id)
        return answerer

    async def _loaded(self, model_id: str) -> Answerer:
        if self._waiting >= self._most:
            raise too_many(f"{self._waiting} requests wait for a model to be loaded already; try again.", RETRY_S)
        self._waiting += 1
        try:
            async with self._turn:
                return await on_own_thread(lambda: self._answerers.find(model_id))
        finally:
            self._waiting -= 1
