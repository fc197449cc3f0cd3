"""The models that answer: each base once in memory with an engine of its own, adapters beside it as they are wanted."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.tagged_text import tags_of
from phinetune.checkpoints.beside_base import read_beside
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.checkpoints.opened import recorded_config
from phinetune.config.answer_weights import AUTO
from phinetune.config.model import ModelSection
from phinetune.engine.choice import has_packed_form
from phinetune.engine.continuous.answer_engine import AnswerEngine, Load
from phinetune.engine.generate import stop_set
from phinetune.errors import ModelError
from phinetune.logs import quiet_libraries
from phinetune.serving.answers.answerer import Answerer, Base, folding, model_of, told_to_client
from phinetune.serving.catalogue import ModelCatalogue, ServedModel
from phinetune.serving.errors import ApiError

logger = logging.getLogger(__name__)

MOST_BASES = 2  # in memory at a time; the one used least recently leaves
LEAST_ROOM = 64  # tokens of a conversation
MOST_ADAPTERS = 64  # beside each base


@dataclass
class LoadedBase(Base):
    """A base in memory, and the adapters beside it: the encoder of each, by its folder."""

    loaded: Loaded
    adapters: OrderedDict[Path, ChatEncoder]
    batches: AnswerEngine


class Answerers:
    """The models of a server that are in memory. Its methods take long and may be called from any thread."""

    def __init__(self, catalogue: ModelCatalogue, weights: str = AUTO, **engine: Any) -> None:
        """Make it empty.

        Args:
            weights: how bases lie in memory; see `load_base`.
            engine: more arguments of each `AnswerEngine`.
        """
        self._catalogue, self._weights, self._options = catalogue, weights, engine
        self._bases: OrderedDict[str, LoadedBase] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, model_id: str) -> Answerer:
        """A model by its name; it is loaded first if it is not in memory.

        Raises:
            ApiError: there is no such model, or it can't be loaded.
        """
        there = self.in_memory(model_id)
        if there:
            return there
        model = model_of(self._catalogue, model_id)
        section = self._section(model)
        with self._lock, told_to_client(model_id):  # one is loaded at a time: two could be more than the memory holds
            return self._with_adapter(model, section, self._base(section, model.base_id))

    def in_memory(self, model_id: str) -> Answerer | None:
        """The model if nothing has to be loaded for it. Never waits for one that is being loaded.

        Raises:
            ApiError: there is no such model.
        """
        model = model_of(self._catalogue, model_id)
        return self._in_memory(model, self._section(model))

    def loads(self) -> dict[str, Load]:
        """What each engine does now, by the name under which its base was first asked for."""
        return {base.name: base.engine.load for base in list(self._bases.values())}

    def close(self) -> None:
        """End all answers."""
        for base in list(self._bases.values()):
            base.engine.close()

    def _in_memory(self, model: ServedModel, section: ModelSection) -> Answerer | None:
        key = section.model_dump_json()
        base = self._bases.get(key)
        if base is None:
            return None
        encoder = base.encoder if model.adapter is None else base.adapters.get(model.adapter)
        if encoder is None:
            return None
        with contextlib.suppress(KeyError):  # it leaves right now
            self._bases.move_to_end(key)
            if model.adapter is not None:
                base.adapters.move_to_end(model.adapter)
        return Answerer(model.id, base, None if model.adapter is None else str(model.adapter), encoder)

    def _section(self, model: ServedModel) -> ModelSection:
        """What to load a model's base by: as it is offered by itself, so that both have one base in memory."""
        offered = self._catalogue.find(model.base_id)
        alike = offered is not None and all(
            getattr(offered.base, key) == getattr(model.base, key)
            for key in ("path", "tokenizer", "quantization", "seed")
        )
        return offered.base if offered and alike else model.base

    def _base(self, section: ModelSection, name: str) -> LoadedBase:
        key = section.model_dump_json()
        found = self._bases.get(key)
        if found is None:
            while len(self._bases) >= MOST_BASES:
                self._drop_idle()
            found = self._bases[key] = self._load(section, name)
        self._bases.move_to_end(key)
        return found

    def _drop_idle(self) -> None:
        """Free the base that was used least recently and answers nothing now.

        Raises:
            ApiError: all of them answer.
        """
        for key, base in self._bases.items():
            if not base.engine.load.conversations:
                base.engine.close()
                del self._bases[key]
                logger.info("base %s has left the memory", base.loaded.base.path)
                return
        raise ApiError(
            429, f"{MOST_BASES} other base models answer now; try again in a moment.", "requests", "rate_limit_exceeded"
        )

    def _load(self, section: ModelSection, name: str) -> LoadedBase:
        quiet_libraries()
        loaded = load_base(section, weights=self._weights)
        if not has_packed_form(loaded.model):
            raise ModelError(f"{section.path}: has no fast form, which answering several at once needs")
        loaded.model.requires_grad_(False)
        engine = AnswerEngine(loaded.model, **self._options)
        if engine.room < LEAST_ROOM:
            engine.close()
            raise ModelError(f"{section.path}: there is no memory left for the keys and values of a conversation")
        logger.info("base %s answers; a conversation may have %d tokens", loaded.base.path, engine.room)
        encoder, tokenizer = folding(make_encoder(loaded.tokenizer)), loaded.tokenizer
        vocabulary, stops = int(loaded.model.config.vocab_size), frozenset(stop_set(loaded.model))
        return LoadedBase(name, tokenizer, vocabulary, stops, engine, encoder, loaded, OrderedDict(), engine)

    def _with_adapter(self, model: ServedModel, section: ModelSection, base: LoadedBase) -> Answerer:
        folder = model.adapter
        if folder is None:
            return Answerer(model.id, base, None, base.encoder)
        if folder not in base.adapters:
            base.batches.add_adapter(str(folder), read_beside(base.loaded, section, folder))
            base.adapters[folder] = encoder_of(folder, base.tokenizer)
            if len(base.adapters) > MOST_ADAPTERS:
                oldest, _ = base.adapters.popitem(last=False)
                base.batches.drop_adapter(str(oldest))
        base.adapters.move_to_end(folder)
        return Answerer(model.id, base, str(folder), base.adapters[folder])


def encoder_of(folder: Path, tokenizer: Any) -> ChatEncoder:
    """Makes token ids of chats by the settings that a run was trained with."""
    data = recorded_config(folder).data
    return folding(make_encoder(tokenizer, data.loss_on, data.system, tags_of(data)))
