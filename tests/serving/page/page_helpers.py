"""A visitor of the page who is signed in, and a tuned model on offer."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from openai import OpenAI

from helpers import TINY
from phinetune.config.model import ModelSection
from phinetune.serving.app import create_app
from phinetune.serving.server import running_state
from phinetune.serving.settings import ServerSettings
from phinetune.serving.state import ServerState
from serving.serving_helpers import KEY, LIMIT_S, ask, until

TUNED = "ft:tiny:phinetune:my-shop:abcdefghijkl"
Answer = tuple[int, dict[str, Any], dict[str, str]]


class Visitor:
    """A browser's session by hand: its cookie, and its token."""

    def __init__(self, client: OpenAI, language: str = "en") -> None:
        self._client = client
        _, told, headers = ask(client, "POST", "/session", {"key": KEY}, {"Authorization": ""})
        self.cookie = headers["set-cookie"].partition(";")[0]
        self._headers = {"Authorization": "", "Cookie": f"{self.cookie}; phinetune_language={language}"}
        self.token = told["csrf_token"]

    def see(self, path: str) -> Answer:
        return ask(self._client, "GET", path, None, self._headers)

    def download(self, path: str) -> tuple[bytes, dict[str, str]]:
        """The bytes of an answer, and its headers."""
        place = urlsplit(str(self._client.base_url))
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=LIMIT_S)
        try:
            connection.request("GET", path, headers={"Cookie": self.cookie})
            answer = connection.getresponse()
            return answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def do(self, method: str, path: str, body: Any = None) -> Answer:
        return ask(self._client, method, path, body, {**self._headers, "X-CSRF-Token": self.token})


def offer_run(state: ServerState, run: Path, name: str = TUNED) -> str:
    """Offer a copy of a run as a tuned model; its name."""
    folder = state.folder / "runs" / "ftjob-abcdefghijkl"
    shutil.copytree(run, folder)
    state.models.add(name, ModelSection(path=TINY).model_dump(), folder, folder.name)
    return name


@contextmanager
def whole_server(folder: Path) -> Iterator[tuple[ServerState, str]]:
    """A context with a server in a thread that trains and exports, too; its state and its URL."""
    with running_state(
        ServerSettings(folder=folder, models={"tiny": ModelSection(path=TINY)}, at_once=1), KEY
    ) as state:
        server = uvicorn.Server(uvicorn.Config(create_app(state), port=0, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield state, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
