"""Work on a thread that nobody waits for when the server ends, as it would for a thread of a pool."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

NAME = "phinetune-own"
Made = TypeVar("Made")


async def on_own_thread(function: Callable[[], Made]) -> Made:
    """What a function gives. It goes on where whoever waits here gives up."""
    done: Future[Made] = Future()
    done.set_running_or_notify_cancel()  # from here on nobody can cancel it, so its end can always be told

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=NAME, daemon=True).start()
    return await asyncio.wrap_future(done)


def end_process() -> None:
    """End this process with status 0 if such work goes on, once all else is done; else return.

    Python's ordinary end would stop the thread in the middle of torch's code, which aborts the process then.
    """
    if any(thread.name == NAME for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
