"""The verb `serve`, as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from phinetune.config.answer_weights import AUTO
from phinetune.config.model import ModelSection
from phinetune.logs import set_up_logging
from phinetune.serving.needs import check_installed
from phinetune.serving.server import run_server
from phinetune.serving.settings import LLAMA_CPP, OWN, PORT, make_settings


def serve(
    models: Sequence[str] | Mapping[str, str | ModelSection] = (),
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    folder: str | Path | None = None,
    key: str | None = None,
    allow_host: Sequence[str] = (),
    at_once: int | None = None,
    backend: str = OWN,
    gguf_type: str | None = None,
    weights: str = AUTO,
    log_contents: bool = False,
    on_ready: Callable[[str, str, str], None] = lambda url, key, where: None,
) -> None:
    """Offer OpenAI's API of files, fine-tuning jobs, models and answers, until SIGINT or SIGTERM.

    Args:
        models: base models by the names that clients use: a folder, a hub id, `starter`, or a section `model`; or texts
            `NAME=PATH`. The starter, if left out.
        host: address to listen on; another than the loopback's needs a `key`.
        port: 0 takes any that is free.
        folder: where files, jobs and runs lie; `PHINETUNE_HOME/server` if left out.
        key: what clients have to know; if left out, the one in the folder, made at the first start.
        allow_host: names by which clients may call the server.
        at_once: jobs trained at the same time, as memory allows; one for each two cores if left out.
        backend: what answers: `phinetune`, its own engine; or `llama.cpp`, with each model as a GGUF file.
        gguf_type: of these files, as `phinetune export --to gguf --type`; q8_0 if left out.
        weights: how bases lie in memory while they answer by phinetune's engine: `auto` or `q8_0`, as `phinetune.chat`
            takes it.
        log_contents: let the log hold what chats say.
        on_ready: is called with the URL, the key, and what is served, when clients can connect.

    Raises:
        PhinetuneError: the port or the folder is taken, others could reach the server and there is no key, or the extra
            `serve` is not installed (or `llamacpp`, for llama.cpp).
    """
    check_installed(llama_cpp=backend == LLAMA_CPP)
    settings = make_settings(models, host, port, folder, allow_host, at_once, log_contents, backend, gguf_type, weights)
    set_up_logging()
    where = f"{', '.join(settings.models)} ({settings.folder})"
    run_server(settings, key, lambda state, url: on_ready(url, state.key, where))
