"""A real server of the answering endpoints in a thread, with the official client, unmodified."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from fastapi import FastAPI
from peft import LoraConfig, get_peft_model

from helpers import DEVICE, TINY
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.serving.answers import router
from phinetune.serving.errors import add_handlers
from phinetune.serving.settings import ServerSettings
from phinetune.serving.state import ServerState, open_state

TUNED = "ft:tiny:phinetune:demo:abc"


@dataclass(frozen=True)
class Served:
    """A server that runs, and a client of it."""

    client: openai.OpenAI
    state: ServerState
    url: str


def write_adapter(folder: Path, section: ModelSection, seed: int = 0, **lora: Any) -> Path:
    """An adapter with weights that change every answer, as PEFT saves it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    model = get_peft_model(load_base(section).model, LoraConfig(task_type="CAUSAL_LM", **settings))
    model.peft_config["default"].base_model_name_or_path = section.path
    model.save_pretrained(folder)
    return folder


def make_state(folder: Path, tiny: ModelSection, adapter: bool = True, **settings: Any) -> ServerState:
    """A server's state with a base model `tiny` and, unless it is there, a tuned one."""
    state = open_state(ServerSettings(folder=folder, models={"tiny": tiny}, **settings), key="secret")
    if adapter:
        state.models.add(TUNED, tiny.model_dump(), write_adapter(folder / "runs" / "demo", tiny), "ftjob-abc")
    return state


@contextmanager
def serving(
    folder: Path,
    tiny: ModelSection | None = None,
    *,
    adapter: bool = True,
    gguf: str | None = None,
    weights: str = "auto",
    log_contents: bool = False,
    **engine: Any,
) -> Iterator[Served]:
    """A server while the context lasts."""
    tiny = tiny or ModelSection(path=TINY, dtype="float32", device=DEVICE)
    state = make_state(folder, tiny, adapter, gguf=gguf, weights=weights, log_contents=log_contents)
    app = FastAPI()
    add_handlers(app)
    app.include_router(router(state, **engine))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=60)
    try:
        yield Served(client, state, url)
    finally:
        client.close()
        [close() for close in reversed(state.closing)]
        server.should_exit = True
        thread.join()
        state.store.close()
