"""What a server is started with: where it listens, where its state lies, which models it offers, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from phinetune.config.answer_weights import AUTO, Q8, check_kind
from phinetune.config.model import ModelSection
from phinetune.config.places import absolute_place
from phinetune.errors import ConfigError
from phinetune.home import cache_folder

PORT = 8686
OWN, LLAMA_CPP = BACKENDS = ("phinetune", "llama.cpp")  # what answers
GGUF_TYPE = "q8_0"


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    Attributes:
        body: bytes of a request without a file.
        file: bytes of an uploaded file.
        rows: of an uploaded file.
        files: that are kept at a time.
        jobs: that wait to be trained.
        answers: bytes of answers that are kept for clients who want them again; the oldest are forgotten.
        requests: that are worked on at the same time; further ones get a 429.
        loading: requests that wait until their model is loaded; further ones get a 429.
    """

    body: int = 8_000_000
    file: int = 512_000_000
    rows: int = 1_000_000
    files: int = 10_000
    jobs: int = 1_000
    answers: int = 256_000_000
    requests: int = 256
    loading: int = 64


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with.

    Attributes:
        folder: where its state lies.
        models: the base models on offer, by the names that clients use.
        hosts: names besides those of the loopback by which clients may call this server.
        at_once: jobs that are trained at the same time; None: one for each two cores.
        gguf: the type of the GGUF files that llama.cpp answers with; None: this project's own engine answers.
        weights: how bases lie in memory while this project's engine answers.
        log_contents: whether the log may hold what chats say.
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "server")
    host: str = "127.0.0.1"
    port: int = PORT
    models: Mapping[str, ModelSection] = field(default_factory=lambda: {"starter": ModelSection(path="starter")})
    hosts: tuple[str, ...] = ()
    at_once: int | None = None
    gguf: str | None = None
    weights: str = AUTO
    log_contents: bool = False
    limits: Limits = field(default_factory=Limits)


def make_settings(
    models: Sequence[str] | Mapping[str, str | ModelSection],
    host: str,
    port: int,
    folder: str | Path | None,
    hosts: Sequence[str],
    at_once: int | None,
    log_contents: bool,
    backend: str = OWN,
    gguf_type: str | None = None,
    weights: str = AUTO,
) -> ServerSettings:
    """The settings from what the verb took.

    Args:
        models: `NAME=PATH` each, or sections or paths by name.

    Raises:
        ConfigError: a model is written in another way, or named twice; or there is no such backend, or it does not
            answer with such weights.
        ModelError: there is no such type of GGUF files.
    """
    gguf = _gguf_type(backend, gguf_type)
    check_kind(weights)
    if weights != AUTO and backend != OWN:
        raise ConfigError(f"--weights {weights} is for --backend {OWN}; for {LLAMA_CPP} give --gguf-type")
    given = ServerSettings(
        host=host,
        port=port,
        hosts=tuple(hosts),
        at_once=at_once,
        gguf=gguf,
        weights=weights,
        log_contents=log_contents,
    )
    if models:
        named = models if isinstance(models, Mapping) else _named_models(models)
        given = replace(given, models={name: _section(model) for name, model in named.items()})
    if weights == Q8:
        _check_q8(given.models)
    return replace(given, folder=Path(folder).expanduser().resolve()) if folder else given


def _check_q8(models: Mapping[str, ModelSection]) -> None:
    """Make sure that the bases on offer can lie in q8_0, as far as that is known before they are read."""
    from phinetune.checkpoints.answer_weights import check_q8
    from phinetune.checkpoints.device import pick_device

    for section in models.values():
        check_q8(section, pick_device(section.device))


def _gguf_type(backend: str, wanted: str | None) -> str | None:
    """The type of the GGUF files that llama.cpp answers with; None if it does not."""
    if backend not in BACKENDS:
        raise ConfigError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend}")
    if backend == OWN:
        if wanted:
            raise ConfigError(f"--gguf-type {wanted} is for --backend {LLAMA_CPP}")
        return None
    from phinetune.exporting.targets import check_kind

    return check_kind("gguf", wanted or GGUF_TYPE)


def _section(model: str | ModelSection) -> ModelSection:
    return model if isinstance(model, ModelSection) else ModelSection(path=absolute_place(model))


def _named_models(models: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    problems = []
    for text in models:
        name, _, path = text.partition("=")
        name, path = name.strip(), path.strip() or name.strip()
        if name in found:
            problems.append(f"--model {text}: the name {name} stands twice")
        elif not name or "/" in name:
            problems.append(f"--model {text}: write it as NAME=PATH, where PATH is a folder, a hub id or `starter`")
        else:
            found[name] = path
    if problems:
        raise ConfigError(problems)
    return found
