"""A conversation with a model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from phinetune.chats.template import Message
from phinetune.checkpoints.opened import Opened
from phinetune.engine.generate import Answer, Sampling, answer_limits, answer_prompts, check_prompts

logger = logging.getLogger(__name__)

ROOM = 0.25  # the share of the positions that is kept free for an answer: older turns leave for it


@dataclass
class Conversation:
    """The turns so far and whom they are with."""

    opened: Opened
    sampling: Sampling
    max_new_tokens: int
    system: str | None = None
    with_base: bool = False
    turns: list[Message] = field(default_factory=list)
    _base: Any = field(default=None, init=False, repr=False)  # of an adapter that changed it; kept for the next message

    def reset(self) -> None:
        self.turns = []

    def prompt_ids(self, message: str) -> list[int]:
        """Token ids of the conversation with `message` as its next user turn.

        The oldest turns leave a conversation that outgrows the model's positions, and a line in the log says so.

        Raises:
            ConfigError: the message by itself is too long. The conversation stays as it was.
        """
        positions = int(self.opened.model.config.max_position_embeddings)
        room = min(self.max_new_tokens, int(positions * ROOM))
        turns = self.turns
        ids = self._all_ids(turns, message)
        while turns and len(ids) + room > positions:
            turns = turns[2:]
            ids = self._all_ids(turns, message)
        check_prompts([ids], positions)
        if len(turns) < len(self.turns):
            logger.warning(
                "the conversation has outgrown the model's %d positions: its oldest %d turns were left out",
                *(positions, len(self.turns) - len(turns)),
            )
        self.turns = turns
        return ids

    def _all_ids(self, turns: list[Message], message: str) -> list[int]:
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        chat = [*head, *turns, {"role": "user", "content": message}]
        return self.opened.encoder.prompt_ids(self.opened.encoder.prepare(chat))

    def answer(self, message: str) -> Answer:
        """Answer in one piece; the turn is remembered."""
        with self._side() as model:
            made = answer_prompts(
                model,
                self.opened.loaded.tokenizer,
                [self.prompt_ids(message)],
                max_new_tokens=self.max_new_tokens,
                batch_size=1,
                sampling=self.sampling,
            )[0]
        self._remember(message, made.text)
        return made

    def stream(self, message: str) -> Iterator[str]:
        """Answer piece by piece; the turn is remembered once the answer has ended."""
        prompt = self.prompt_ids(message)
        limit = answer_limits(self.opened.model, [prompt], self.max_new_tokens)[0]
        ids = torch.tensor([prompt], device=self.opened.loaded.device)
        streamer = TextIteratorStreamer(self.opened.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        pieces: list[str] = []
        with self._side() as model:
            worker = _Worker(lambda stop: self._generate(model, ids, limit, streamer, stop), streamer)
            try:
                for piece in streamer:
                    pieces.append(piece)
                    yield piece
            finally:
                worker.finish()
        self._remember(message, "".join(pieces))

    def _generate(
        self, model: Any, ids: torch.Tensor, limit: int, streamer: TextIteratorStreamer, stop: Callable[..., Any]
    ) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            pad_token_id=self.opened.loaded.tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=[stop],
            **self.sampling.options(),
        )

    def _side(self) -> contextlib.AbstractContextManager[Any]:
        if not self.with_base:
            return contextlib.nullcontext(self.opened.model)
        self._base = self._base if self._base is not None else self.opened.base_again()
        return self.opened.base_side() if self._base is None else contextlib.nullcontext(self._base)

    def _remember(self, message: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]


class _Worker:
    """Generation on a thread of its own, so that its pieces can be shown as they come; its error comes back."""

    def __init__(self, work: Callable[[Callable[..., Any]], None], streamer: TextIteratorStreamer) -> None:
        self._stopped = False
        self._error: BaseException | None = None
        self._streamer = streamer
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[..., Any]], None]) -> None:
        try:
            work(self._should_stop)
        except BaseException as error:
            self._error = error
            self._streamer.end()

    def _should_stop(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), self._stopped, device=ids.device)

    def finish(self) -> None:
        """Stop at the next token if it has not ended, wait, and raise what went wrong."""
        self._stopped = True
        self._thread.join()
        if self._error is not None:
            raise self._error
