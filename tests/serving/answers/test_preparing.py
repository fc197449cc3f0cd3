"""While a base loads: whoever does not want it goes on, and those who want it are bounded. A server stops meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from helpers import TINY
from phinetune.config.model import ModelSection
from phinetune.serving.settings import Limits
from serving.answers.served import TUNED, write_adapter
from serving.serving_helpers import ServerProcess, threaded, until

ASKED: list[Any] = [{"role": "user", "content": "what is 7 · 8?"}]
WAIT = 42  # more than the threads that the server's other endpoints have


def test_a_base_that_loads_holds_up_only_those_who_want_it(tmp_path: Path) -> None:
    tiny = ModelSection(path=TINY)
    with threaded(tmp_path, limits=Limits(loading=WAIT)) as (state, client):
        state.models.add(TUNED, tiny.model_dump(), write_adapter(tmp_path / "runs" / "demo", tiny), "ftjob-abc")
        ready: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 1}
        client.chat.completions.create(**ready)
        lock = state.closing[0].__self__._lock  # type: ignore[attr-defined]
        told: list[int] = []

        def ask(i: int) -> int:
            kinds: list[Any] = [
                lambda: client.chat.completions.create(model=TUNED, messages=ASKED, max_tokens=1),
                lambda: client.completions.create(model=TUNED, prompt="hi", max_tokens=1),
                lambda: client.responses.create(model=TUNED, input="hi", max_output_tokens=1),
            ]
            try:
                kinds[i % 3]()
            except openai.RateLimitError as error:
                told.append(int(error.response.headers["retry-after"]))
                return 429
            return 200

        with lock, ThreadPoolExecutor(WAIT + 3) as pool:  # as if a base were being loaded
            answers = [pool.submit(ask, i) for i in range(WAIT + 3)]
            try:
                until(lambda: len(told) == 3)  # so all others wait
                quick = client.with_options(timeout=30)
                assert quick.get("/../healthz", cast_to=object)
                assert {model.id for model in quick.models.list()} == {"tiny", TUNED}
                assert quick.files.list().data == []
                assert quick.chat.completions.create(**ready).choices
            finally:
                lock.release()
                codes = [answer.result() for answer in answers]
                lock.acquire()
        assert codes.count(200) == WAIT
        assert set(told) == {5}


def test_a_server_stops_while_a_base_loads(tmp_path: Path) -> None:
    """The hub that it would come from takes the call and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        place = f"http://127.0.0.1:{hub.getsockname()[1]}"
        silent = {"HF_ENDPOINT": place, "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "600", "HF_HOME": str(tmp_path)}
        server = ServerProcess(tmp_path / "server", model="far=someone/phi", environment=silent)
        client = server.start()
        waiting = threading.Thread(target=ask_in_vain, args=(client,))
        waiting.start()
        try:
            call = hub.accept()[0]
            with call:
                assert call.recv(1)  # the server asks for the model's files
                status, seconds = server.stop()
            assert (status, seconds < 10) == (0, True)
        finally:
            server.kill()
            waiting.join()


def ask_in_vain(client: openai.OpenAI) -> None:
    with contextlib.suppress(openai.APIError):
        client.chat.completions.create(model="far", messages=ASKED)
