"""A conversation with a model, and the terminal's side of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from transformers import TextIteratorStreamer

from phinetune.chat.template import Message
from phinetune.checkpoints.opened import Tuned, open_model
from phinetune.engine.generate import Answer, Sampling, answer_prompts

HELP = "/reset starts anew, /base switches between tuned and base model, /help shows this, /exit or Ctrl-D leaves"


@dataclass
class Conversation:
    """The turns so far and whom they are with."""

    tuned: Tuned
    sampling: Sampling
    max_new_tokens: int
    system: str | None = None
    with_base: bool = False
    turns: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        self.turns = []

    def prompt_ids(self, message: str) -> list[int]:
        """Token ids of the conversation with `message` as its next user turn."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        chat = [*head, *self.turns, {"role": "user", "content": message}]
        return self.tuned.encoder.prompt_ids(self.tuned.encoder.prepare(chat))

    def answer(self, message: str) -> Answer:
        """Answer in one piece; the turn is remembered."""
        with self._side():
            made = answer_prompts(
                self.tuned.model,
                self.tuned.loaded.tokenizer,
                [self.prompt_ids(message)],
                max_new_tokens=self.max_new_tokens,
                batch_size=1,
                sampling=self.sampling,
            )[0]
        self._remember(message, made.text)
        return made

    def stream(self, message: str) -> Iterator[str]:
        """Answer piece by piece; the turn is remembered once the answer has ended."""
        ids = torch.tensor([self.prompt_ids(message)], device=self.tuned.loaded.device)
        streamer = TextIteratorStreamer(self.tuned.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        pieces: list[str] = []
        with self._side():
            worker = _Worker(lambda stop: self._generate(ids, streamer, stop), streamer)
            try:
                for piece in streamer:
                    pieces.append(piece)
                    yield piece
            finally:
                worker.finish()
        self._remember(message, "".join(pieces))

    def _generate(self, ids: torch.Tensor, streamer: TextIteratorStreamer, stop: Callable[..., Any]) -> None:
        self.tuned.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tuned.loaded.tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=[stop],
            **self.sampling.options(),
        )

    def _side(self) -> Any:
        return (
            self.tuned.model.disable_adapter() if self.with_base and self.tuned.is_tuned else contextlib.nullcontext()
        )

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


def chat(conversation: Conversation, console: Console, read: Callable[[str], str] = input) -> None:
    """Read messages and stream answers until the user leaves. Ctrl-C stops an answer, not the chat."""
    console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            message = read("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if message in ("/exit", "/quit"):
            return
        if message.startswith("/"):
            console.print(_command(conversation, message), style="dim", highlight=False)
        elif message:
            _show_answer(conversation, message, console)


def _command(conversation: Conversation, message: str) -> str:
    if message == "/reset":
        conversation.reset()
        return "a new conversation"
    if message == "/base":
        if not conversation.tuned.is_tuned:
            return "this is a model without an adapter: it is the base"
        conversation.with_base = not conversation.with_base
        return "now talking to the base model" if conversation.with_base else "now talking to the tuned model"
    return HELP if message == "/help" else f"no such command: {message}; {HELP}"


def _show_answer(conversation: Conversation, message: str, console: Console) -> None:
    name = "base" if conversation.with_base or not conversation.tuned.is_tuned else "tuned"
    console.print(f"{name}> ", end="", style="bold green", highlight=False)
    pieces = conversation.stream(message)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        console.print(" [dim](stopped)[/dim]", end="")
    console.print()


def open_conversation(
    run: str,
    system: str | None,
    max_new_tokens: int,
    sampling: tuple[float, float, int] = (0.0, 1.0, 0),
    seed: int | None = None,
    device: str = "auto",
) -> Conversation:
    """A conversation with a run, an adapter folder or a model.

    Args:
        sampling: temperature (0 is greedy), top-p and top-k (0 is all).

    Raises:
        ModelError: see `phinetune.checkpoints.opened.open_model`.
    """
    tuned = open_model(run, device=device)
    if seed is not None:
        torch.manual_seed(seed)
    return Conversation(tuned, Sampling(*sampling), max_new_tokens, system)
