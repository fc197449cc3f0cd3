"""The models that answer: each base once in memory with an engine of its own, adapters beside it as they are wanted."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.tagged_text import tags_of
from phinetune.checkpoints.beside_base import read_beside
from phinetune.checkpoints.load import Loaded, load_base
from phinetune.checkpoints.opened import recorded_config
from phinetune.config.model import ModelSection
from phinetune.engine.choice import has_packed_form
from phinetune.engine.continuous.answer_engine import AnswerEngine, Load
from phinetune.engine.generate import stop_set
from phinetune.errors import ModelError, PhinetuneError
from phinetune.logs import quiet_libraries
from phinetune.serving.answers.grammars import Grammars
from phinetune.serving.answers.texts import TokenTexts
from phinetune.serving.answers.tool_calls import CallForm, call_form
from phinetune.serving.catalogue import ModelCatalogue, ServedModel
from phinetune.serving.errors import ApiError

logger = logging.getLogger(__name__)

MOST_BASES = 2  # in memory at a time; the one used least recently leaves
LEAST_ROOM = 64  # tokens of a conversation
MOST_ADAPTERS = 64  # beside each base


@dataclass
class Base:
    """A base in memory, and what answers with it."""

    loaded: Loaded
    engine: AnswerEngine
    encoder: ChatEncoder
    adapters: OrderedDict[Path, ChatEncoder]

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.loaded.tokenizer, int(self.loaded.model.config.vocab_size))

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.loaded.tokenizer)

    @cached_property
    def call_form(self) -> CallForm:
        return call_form(self.loaded.tokenizer, self.encoder.tools)

    @cached_property
    def stops(self) -> frozenset[int]:
        return frozenset(stop_set(self.loaded.model))


@dataclass(frozen=True)
class Answerer:
    """One model, ready to answer.

    Attributes:
        adapter: its name in the engine; None is the base.
        encoder: makes token ids of chats, by the settings that the adapter was trained with.
    """

    id: str
    base: Base
    adapter: str | None
    encoder: ChatEncoder

    @property
    def engine(self) -> AnswerEngine:
        return self.base.engine

    @property
    def tokenizer(self) -> Any:
        return self.base.loaded.tokenizer

    @property
    def vocabulary(self) -> int:
        return int(self.base.loaded.model.config.vocab_size)


class Answerers:
    """The models of a server that are in memory. Its methods take long and may be called from any thread."""

    def __init__(self, catalogue: ModelCatalogue, **engine: Any) -> None:
        """Make it empty.

        Args:
            engine: more arguments of each `AnswerEngine`.
        """
        self._catalogue, self._options = catalogue, engine
        self._bases: OrderedDict[str, Base] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, model_id: str) -> Answerer:
        """A model by its name; it is loaded first if it is not in memory.

        Raises:
            ApiError: there is no such model, or it can't be loaded.
        """
        model = self._catalogue.find(model_id)
        if model is None:
            raise ApiError(
                404,
                f"The model `{model_id}` does not exist or you do not have access to it.",
                code="model_not_found",
                param="model",
            )
        section = self._section(model)
        there = self._in_memory(model, section)
        if there:
            return there
        with self._lock:  # one is loaded at a time: two could be more than the memory holds
            try:
                return self._with_adapter(model, section, self._base(section))
            except PhinetuneError as error:
                logger.warning("model %s can't answer: %s", model_id, error)
                raise ApiError(503, f"The model `{model_id}` can't answer: {error}", "server_error") from error

    def loads(self) -> dict[str, Load]:
        """What each engine does now, by the path of its base."""
        return {base.loaded.base.path: base.engine.load for base in list(self._bases.values())}

    def close(self) -> None:
        """End all answers."""
        for base in list(self._bases.values()):
            base.engine.close()

    def _in_memory(self, model: ServedModel, section: ModelSection) -> Answerer | None:
        """The model if nothing has to be loaded for it. Does not wait while another one is loaded."""
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

    def _base(self, section: ModelSection) -> Base:
        key = section.model_dump_json()
        found = self._bases.get(key)
        if found is None:
            while len(self._bases) >= MOST_BASES:
                self._drop_idle()
            found = self._bases[key] = self._load(section)
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

    def _load(self, section: ModelSection) -> Base:
        quiet_libraries()
        loaded = load_base(section)
        if not has_packed_form(loaded.model):
            raise ModelError(f"{section.path}: has no fast form, which answering several at once needs")
        loaded.model.requires_grad_(False)
        engine = AnswerEngine(loaded.model, **self._options)
        if engine.room < LEAST_ROOM:
            engine.close()
            raise ModelError(f"{section.path}: there is no memory left for the keys and values of a conversation")
        logger.info("base %s answers; a conversation may have %d tokens", loaded.base.path, engine.room)
        return Base(loaded, engine, _folding(make_encoder(loaded.tokenizer)), OrderedDict())

    def _with_adapter(self, model: ServedModel, section: ModelSection, base: Base) -> Answerer:
        folder = model.adapter
        if folder is None:
            return Answerer(model.id, base, None, base.encoder)
        if folder not in base.adapters:
            base.engine.add_adapter(str(folder), read_beside(base.loaded, section, folder))
            base.adapters[folder] = _encoder_of(folder, base)
            if len(base.adapters) > MOST_ADAPTERS:
                oldest, _ = base.adapters.popitem(last=False)
                base.engine.drop_adapter(str(oldest))
        base.adapters.move_to_end(folder)
        return Answerer(model.id, base, str(folder), base.adapters[folder])


def _encoder_of(folder: Path, base: Base) -> ChatEncoder:
    data = recorded_config(folder).data
    return _folding(make_encoder(base.loaded.tokenizer, data.loss_on, data.system, tags_of(data)))


def _folding(encoder: ChatEncoder) -> ChatEncoder:
    """An encoder that folds a system message into the first user turn where the template would drop it in silence."""
    if encoder.system != "keep" or "system" not in encoder.dropped_roles:
        return encoder
    logger.info("this template has no system messages: they are put before the first user turn")
    return replace(encoder, system="fold")


Finder = Callable[[str], Answerer]
