"""A server on the tiny model: as a process of its own, or as a thread over a state that the test holds."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
from phinetune.serving.state import ServerState, open_state

KEY = "sk-a-key-of-the-tests"
LIMIT_S = 240.0  # after which a test gives up: on a machine that does nothing else, seconds


class ServerProcess:
    """`phinetune serve` on a folder, started, killed and started again.

    Attributes:
        key: of the folder, as each start printed it.
    """

    def __init__(
        self,
        folder: Path,
        at_once: int | None = 1,
        model: str = f"tiny={TINY}",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.key, self.url = folder, "", ""
        self._model, self._environment = model, {**os.environ, **(environment or {})}
        self._at_once = ["--at-once", str(at_once)] if at_once else []
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> OpenAI:
        """Start it; a client of it, as its own lines say."""
        words = ["serve", "--model", self._model, "--port", "0", *self._at_once, "--folder", str(self.folder)]
        with (self.folder.parent / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "phinetune", *words],
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout
        said: dict[str, str] = {}
        while "OPENAI_API_KEY" not in said:  # the second of the two lines
            line = self._process.stdout.readline()
            assert line, (self.folder.parent / "server.log").read_text()
            name, _, value = line.strip().removeprefix("export ").partition("=")
            said[name] = value
        self.url, self.key = said["OPENAI_BASE_URL"], said["OPENAI_API_KEY"]
        return OpenAI(base_url=self.url, api_key=self.key, max_retries=0)

    def kill(self) -> None:
        assert self._process
        self._process.kill()
        self._process.communicate()

    def stop(self) -> tuple[int, float]:
        """SIGTERM; its exit status, and the seconds that it took."""
        assert self._process
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(LIMIT_S), time.monotonic() - began


@contextmanager
def threaded(folder: Path, **settings: Any) -> Iterator[tuple[ServerState, OpenAI]]:
    """A context with a server in a thread, whose jobs nobody trains, and a client of it."""
    models = {"tiny": ModelSection(path=TINY)}
    state = open_state(ServerSettings(**{"folder": folder, "models": models, **settings}), KEY)
    try:
        with _listening(state) as client:
            yield state, client
    finally:
        for close in reversed(state.closing):
            close()
        state.workshop.close()
        state.store.close()


@contextmanager
def training_server(folder: Path, models: Mapping[str, ModelSection], **settings: Any) -> Iterator[OpenAI]:
    """A context with a client of a server in a thread that trains its jobs, each in a process."""
    made = ServerSettings(folder=folder, models=models, **settings)
    with running_state(made, KEY) as state, _listening(state) as client:
        yield client


@contextmanager
def _listening(state: ServerState) -> Iterator[OpenAI]:
    """A context with a client of a server in a thread over a state."""
    config = uvicorn.Config(create_app(state), port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    finally:
        server.should_exit = True
        thread.join(10)


def until(seen: Callable[[], Any]) -> Any:
    """Wait until a function returns something, and return it."""
    began = time.monotonic()
    while not (found := seen()):
        assert time.monotonic() - began < LIMIT_S, "waited too long"
        time.sleep(0.05)
    return found


def ask(
    client: OpenAI, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """A request by hand, with the key: status, the JSON of the answer, and its headers."""
    place = urlsplit(str(client.base_url))
    assert place.hostname
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=LIMIT_S)
    sent = json.dumps(body).encode() if isinstance(body, dict) else body
    given = {"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json", **(headers or {})}
    try:
        connection.request(method, path, sent, {name: value for name, value in given.items() if value})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    tree = json.loads(text) if text.startswith(("{", "[")) else {"text": text}
    return answer.status, tree, {name.lower(): value for name, value in answer.getheaders()}


def keep_file(state: ServerState, id: str, form: str = "chat", purpose: str = "fine-tune") -> str:
    """Put a file into a state as if it had been uploaded."""
    row = {"id": id, "created_at": 1, "bytes": 3, "filename": f"{id}.jsonl", "purpose": purpose, "form": form}
    state.store.insert("files", {**row, "rows": 1})
    (state.folder / "files" / f"{id}.jsonl").write_text("{}\n")
    return id
