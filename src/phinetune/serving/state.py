"""All that the parts of a server share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from phinetune.serving.catalogue import ModelCatalogue
from phinetune.serving.settings import ServerSettings
from phinetune.serving.store import DATABASE, Store
from phinetune.serving.workshop import Workshop


@dataclass
class ServerState:
    """All that the parts of a server share.

    Attributes:
        settings: what it was started with.
        store: what it must not lose.
        models: what it offers.
        key: what a client has to know.
        workshop: where files are looked at and jobs planned.
        wake_jobs: lets whoever keeps the jobs look at them now.
        closing: functions that are called when the server stops, last one first; they take at most some seconds.
        counters: numbers for `/metrics`, by name.
        gauges: functions that give more of them, as they are now.
    """

    settings: ServerSettings
    store: Store
    models: ModelCatalogue
    key: str
    workshop: Workshop = field(default_factory=Workshop)
    wake_jobs: Callable[[], None] = lambda: None
    closing: list[Callable[[], None]] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    gauges: list[Callable[[], Iterable[tuple[str, float]]]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.settings.folder

    def count(self, name: str, by: float = 1) -> None:
        """Add to one of the numbers for `/metrics`."""
        self.counters[name] = self.counters.get(name, 0) + by


def open_state(settings: ServerSettings, key: str) -> ServerState:
    """The state in a server's folder, which is made if it is missing.

    Raises:
        PhinetuneError: the folder's state can't be used, or a model's name can't.
    """
    settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("files", "jobs", "runs", "exports"):
        (settings.folder / name).mkdir(exist_ok=True, mode=0o700)
    store = Store(settings.folder / DATABASE)
    return ServerState(settings, store, ModelCatalogue(settings.folder, store, settings.models), key)
