"""What a server is started with: where it listens, where its state lies, which models it offers, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phinetune.config.model import ModelSection
from phinetune.home import cache_folder

PORT = 8686


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    Attributes:
        body: bytes of a request without a file.
        file: bytes of an uploaded file.
        rows: of an uploaded file.
        files: that are kept at a time.
        jobs: that wait to be trained.
        requests: that are worked on at the same time; further ones get a 429.
    """

    body: int = 8_000_000
    file: int = 512_000_000
    rows: int = 1_000_000
    files: int = 10_000
    jobs: int = 1_000
    requests: int = 256


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with.

    Attributes:
        folder: where its state lies.
        models: the base models on offer, by the names that clients use.
        hosts: names besides those of the loopback by which clients may call this server.
        log_contents: whether the log may hold what chats say.
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "server")
    host: str = "127.0.0.1"
    port: int = PORT
    models: Mapping[str, ModelSection] = field(default_factory=lambda: {"starter": ModelSection(path="starter")})
    hosts: tuple[str, ...] = ()
    log_contents: bool = False
    limits: Limits = field(default_factory=Limits)
