"""The models that a server offers: the base models that it was started with, and what its jobs have made of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.config.model import ModelSection
from phinetune.errors import ConfigError
from phinetune.serving.store import Store

OWNER = "phinetune"  # of all models; it stands where OpenAI's names have the organisation
FINE_TUNED = "ft:"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a list of models shows it.

    Attributes:
        created: seconds since 1970.
    """

    id: str
    created: int
    owned_by: str = OWNER

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "object": "model", "created": self.created, "owned_by": self.owned_by}


@dataclass(frozen=True, kw_only=True)
class ServedModel(Model):
    """A model with what is needed to load it.

    Attributes:
        base: the checkpoint, its dtype and its tokenizer.
        adapter: the folder of its adapter, a run or one of its checkpoints; None for a base model.
        base_id: the name under which the base was offered when it was tuned.
    """

    base: ModelSection
    adapter: Path | None = None
    base_id: str


class ModelCatalogue:
    """The models of a server."""

    def __init__(self, folder: Path, store: Store, bases: Mapping[str, ModelSection]) -> None:
        """Make one.

        Args:
            folder: the server's, which holds the folders of its runs.
            bases: the base models by name.

        Raises:
            ConfigError: a name can't stand in the name of a tuned model.
        """
        bad = [name for name in bases if not name or ":" in name or name != name.strip() or not name.isprintable()]
        if bad:
            raise ConfigError([f"--model {name!r}: a model's name is printable text without `:`" for name in bad])
        self._folder, self._store, self._bases, self._began = folder, store, dict(bases), int(time.time())
        self.when_deleted: list[Callable[[Path], None]] = []  # called with the folder of the model's adapter

    def names(self) -> list[Model]:
        """All models on offer, base models first, then the tuned ones and their checkpoints, oldest first."""
        bases: list[Model] = [Model(id=name, created=self._began) for name in self._bases]
        rows = self._store.rows("SELECT id, created_at FROM models WHERE NOT deleted ORDER BY seq")
        return bases + [Model(id=row["id"], created=row["created_at"]) for row in rows]

    def find(self, model_id: str) -> ServedModel | None:
        """The model of this name; None if there is none, or its files are gone."""
        if model_id in self._bases:
            return ServedModel(id=model_id, created=self._began, base=self._bases[model_id], base_id=model_id)
        row = self._store.row("SELECT * FROM models WHERE id = ? AND NOT deleted", [model_id])
        if row is None:
            return None
        adapter = self._folder / row["folder"]
        if not (adapter / "adapter_config.json").is_file():
            return None
        base = ModelSection.model_validate(json.loads(row["base"]))
        name = model_id.removeprefix(FINE_TUNED).split(":", 1)[0]
        return ServedModel(id=row["id"], created=row["created_at"], base=base, adapter=adapter, base_id=name)

    def add(self, model_id: str, base: Mapping[str, Any], folder: Path, job: str) -> None:
        """Offer a tuned model. One that is there already stays as it is.

        Args:
            base: the section `model` that it was trained with, without an adapter.
            folder: of its adapter, in the server's folder.
            job: the id of the job that made it.
        """
        place = folder.relative_to(self._folder)
        self._store.write(
            "INSERT OR IGNORE INTO models (id, created_at, base, folder, job) VALUES (?, ?, ?, ?, ?)",
            [model_id, int(time.time()), json.dumps(base), str(place), job],
        )

    def delete(self, model_id: str) -> bool:
        """Offer a tuned model no longer; whether it was there. Its run stays on the disk."""
        row = self._store.row("SELECT folder FROM models WHERE id = ? AND NOT deleted", [model_id])
        if row is None or not self._store.write(
            "UPDATE models SET deleted = 1 WHERE id = ? AND NOT deleted", [model_id]
        ):
            return False
        for told in self.when_deleted:
            told(self._folder / row["folder"])
        return True

    @property
    def base_names(self) -> list[str]:
        return list(self._bases)


def tuned_name(base_id: str, suffix: str, job: str, step: int | None = None) -> str:
    """The name of what a job makes, as `ft:BASE:phinetune:SUFFIX:ID`, or of its checkpoint after a step."""
    name = f"{FINE_TUNED}{base_id}:{OWNER}:{suffix}:{job.rpartition('-')[2]}"
    return name if step is None else f"{name}:ckpt-step-{step}"
