"""A model that is ready to answer: its engine, and what makes tokens of a request and text of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from phinetune.chats.encoder import ChatEncoder
from phinetune.engine.continuous.answer_engine import Load
from phinetune.engine.continuous.requests import AnswerStream, Event, Request
from phinetune.errors import PhinetuneError
from phinetune.serving.answers.grammars import Grammars
from phinetune.serving.answers.texts import TokenTexts
from phinetune.serving.answers.tool_calls import CallForm, call_form
from phinetune.serving.catalogue import ModelCatalogue, ServedModel
from phinetune.serving.errors import ApiError

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Answers requests from any thread."""

    @property
    def room(self) -> int:
        """How many tokens a conversation may have, its answer included."""

    @property
    def load(self) -> Load:
        """What it does now."""

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> AnswerStream:
        """Ask for an answer, whose events the listener gets.

        Raises:
            Busy: too many requests wait.
            TooLong: there is no room for the prompt and its answer.
            ApiError: this engine can't do what is asked for.
        """

    def close(self) -> None:
        """End all answers."""


@dataclass
class Base:
    """What models on the same weights share.

    Attributes:
        name: by which its numbers are told in `/metrics`.
        vocabulary: how many logits it has.
        stops: ids that end an answer.
        encoder: of the base itself.
    """

    name: str
    tokenizer: Any
    vocabulary: int
    stops: frozenset[int]
    engine: Engine
    encoder: ChatEncoder

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocabulary)

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    @cached_property
    def call_form(self) -> CallForm:
        return call_form(self.tokenizer, self.encoder.tools)


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
    def engine(self) -> Engine:
        return self.base.engine

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def vocabulary(self) -> int:
        return self.base.vocabulary


class Finder(Protocol):
    """The models of a server that can answer. Its methods may take long and may be called from any thread."""

    def find(self, model_id: str) -> Answerer:
        """A model by its name; it is loaded first if it is not in memory.

        Raises:
            ApiError: there is no such model, or it can't be loaded.
        """

    def in_memory(self, model_id: str) -> Answerer | None:
        """The model if it is in memory. Never waits for one that is being loaded.

        Raises:
            ApiError: there is no such model.
        """

    def loads(self) -> Mapping[str, Load]:
        """What each engine does now, by the name of its base."""

    def close(self) -> None:
        """End all answers."""


def model_of(catalogue: ModelCatalogue, model_id: str) -> ServedModel:
    """A model on offer.

    Raises:
        ApiError: there is none of this name.
    """
    model = catalogue.find(model_id)
    if model is None:
        message = f"The model `{model_id}` does not exist or you do not have access to it."
        raise ApiError(404, message, code="model_not_found", param="model")
    return model


@contextmanager
def told_to_client(model_id: str) -> Iterator[None]:
    """Say in the API's form why a model can't answer.

    Raises:
        ApiError: in place of a `PhinetuneError`.
    """
    try:
        yield
    except PhinetuneError as error:
        logger.warning("model %s can't answer: %s", model_id, error)
        raise ApiError(503, f"The model `{model_id}` can't answer: {error}", "server_error") from error


def folding(encoder: ChatEncoder) -> ChatEncoder:
    """An encoder that folds a system message into the first user turn where the template would drop it in silence."""
    if encoder.system != "keep" or "system" not in encoder.dropped_roles:
        return encoder
    logger.info("this template has no system messages: they are put before the first user turn")
    return replace(encoder, system="fold")
