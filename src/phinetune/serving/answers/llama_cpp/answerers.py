"""The models that llama.cpp answers for: each is exported to GGUF when it is first asked for, the tuned ones merged."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch

from phinetune.chats.encoder import make_encoder
from phinetune.engine.continuous.answer_engine import CACHE_SHARE, Load
from phinetune.engine.device_memory import free_bytes
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import open_checkpoint
from phinetune.serving.answers.answerer import Answerer, Base, folding, model_of, told_to_client
from phinetune.serving.answers.answerers import LEAST_ROOM, encoder_of
from phinetune.serving.answers.llama_cpp.engine import SLOTS, SPARE, LlamaEngine
from phinetune.serving.answers.llama_cpp.files import context_of, drop_files, gguf_file, keep_files, place_of
from phinetune.serving.catalogue import ModelCatalogue, ServedModel
from phinetune.serving.errors import too_many

logger = logging.getLogger(__name__)

MOST_MODELS = 2  # in memory at a time; the one used least recently leaves


class LlamaAnswerers:
    """The models that llama.cpp has in memory. Its methods take long and may be called from any thread."""

    def __init__(self, catalogue: ModelCatalogue, folder: Path, kind: str) -> None:
        """Make it empty.

        Args:
            folder: the server's; the files lie in it.
            kind: the type of the files' numbers.
        """
        self._catalogue, self._folder, self._kind = catalogue, folder, kind
        self._found: OrderedDict[str, Answerer] = OrderedDict()
        self._lock = threading.Lock()
        keep_files(folder, _places(catalogue))
        catalogue.when_deleted.append(lambda adapter: drop_files(folder, str(adapter)))

    def find(self, model_id: str) -> Answerer:
        """A model by its name; it is exported and loaded first if it is not in memory.

        Raises:
            ApiError: there is no such model, or it can't be loaded.
        """
        there = self.in_memory(model_id)
        if there:
            return there
        model = model_of(self._catalogue, model_id)
        with self._lock:  # one is loaded at a time: two could be more than the memory holds
            there = self._found.get(model_id)
            if there and not _engine(there).is_alive:
                logger.error("llama.cpp ended while it served %s; it is started again", model_id)
                _engine(self._found.pop(model_id)).close()
                there = None
            with told_to_client(model_id):
                answerer = there or self._load(model)
            self._found[model_id] = answerer
            self._found.move_to_end(model_id)
            return answerer

    def in_memory(self, model_id: str) -> Answerer | None:
        """The model if llama.cpp has it. Never waits for one that is being exported or loaded.

        Raises:
            ApiError: there is no such model.
        """
        model_of(self._catalogue, model_id)
        there = self._found.get(model_id)
        if there is None or not _engine(there).is_alive:
            return None
        with contextlib.suppress(KeyError):  # it leaves right now
            self._found.move_to_end(model_id)
        return there

    def loads(self) -> Mapping[str, Load]:
        """What llama.cpp does now, by the name of each model."""
        return {name: answerer.engine.load for name, answerer in list(self._found.items())}

    def close(self) -> None:
        """End all answers."""
        for answerer in list(self._found.values()):
            answerer.engine.close()

    def _load(self, model: ServedModel) -> Answerer:
        while len(self._found) >= MOST_MODELS:
            self._drop_idle()
        path = place_of(model)
        source = open_checkpoint(path)
        file = gguf_file(self._folder, path, source, self._kind)
        context = context_of(source, SLOTS, int(CACHE_SHARE * free_bytes(torch.device("cpu"))))
        if context - SPARE < LEAST_ROOM:
            raise ModelError(f"{path}: there is no memory left for the keys and values of a conversation")
        engine = LlamaEngine(file, context)
        logger.info("llama.cpp answers for %s; a conversation may have %d tokens", model.id, engine.room)
        tokenizer, stops = source.tokenizer, source.generation_config.eos_token_id
        encoder = encoder_of(model.adapter, tokenizer) if model.adapter else folding(make_encoder(tokenizer))
        base = Base(
            name=model.id,
            tokenizer=tokenizer,
            vocabulary=int(source.config.vocab_size),
            stops=frozenset([stops] if isinstance(stops, int) else stops or []),
            engine=engine,
            encoder=encoder,
        )
        return Answerer(model.id, base, None, encoder)

    def _drop_idle(self) -> None:
        """Free the model that was used least recently and answers nothing now.

        Raises:
            ApiError: all of them answer.
        """
        for name, answerer in self._found.items():
            if not answerer.engine.load.conversations:
                answerer.engine.close()
                del self._found[name]
                return
        raise too_many(f"{MOST_MODELS} other models answer now; try again in a moment.")


def _engine(answerer: Answerer) -> LlamaEngine:
    return cast(LlamaEngine, answerer.engine)


def _places(catalogue: ModelCatalogue) -> Iterator[str]:
    """What the files of all models on offer are made from."""
    for model in catalogue.names():
        found = catalogue.find(model.id)
        if found:
            with contextlib.suppress(ModelError):  # it has no file
                yield place_of(found)
