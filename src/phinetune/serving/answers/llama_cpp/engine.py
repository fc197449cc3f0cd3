"""Asks llama.cpp for answers, token by token, as `phinetune.engine.continuous.AnswerEngine` gives them.

Prompts go there as token ids of our own template and tokenizer, so what a model reads is the same with both engines.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phinetune.engine.continuous.answer_engine import Load
from phinetune.engine.continuous.requests import AnswerStream, Busy, Ended, Event, Reason, Request, Token, TooLong
from phinetune.errors import ModelError
from phinetune.serving.errors import ApiError

logger = logging.getLogger(__name__)

SPARE = 8  # tokens of llama.cpp's context that no conversation takes: it ends an answer shortly before its end
SLOTS = 4  # conversations that are answered together
MOST_WAITING = 64  # that wait besides
UNTOLD = -1  # the id of a token that llama.cpp does not tell: it is part of a sign
SEEDS = 2**32 - 1  # llama.cpp takes smaller ones; this one stands for a random one


class LlamaEngine:
    """One GGUF file in llama.cpp.

    Attributes:
        room: how many tokens a conversation may have, its answer included.
    """

    def __init__(self, file: Path, context: int, *, slots: int = SLOTS, most_waiting: int = MOST_WAITING) -> None:
        """Start its process, and wait until it answers.

        Args:
            context: tokens of llama.cpp's context for each conversation.

        Raises:
            ModelError: llama.cpp does not load the file.
        """
        self._file, self._context, self.room = file, context, context - SPARE
        self._slots, self._most = slots, slots + most_waiting
        self._key = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._streams: set[AnswerStream] = set()
        self._answered = self._read = self._reused = 0
        self._closed = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phinetune.serving.answers.llama_cpp.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for the server, which then ends it
            text=True,
            encoding="utf-8",
        )
        self._place = urlsplit(self._begun())

    def _begun(self) -> str:
        """Say what is to be served; the address there."""
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wish = {"file": str(self._file), "slots": self._slots, "tokens": self._context, "threads": threads}
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):  # it has ended; its silence is told below
            self._process.stdin.write(json.dumps({**wish, "key": self._key}) + "\n")
            self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline() or "{}")
        if "url" not in reply:
            self._process.kill()
            told = reply.get("problem") or f"its process ended with status {self._process.wait()}"
            raise ModelError(f"llama.cpp does not load {self._file.name}: {told}")
        return str(reply["url"])

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def load(self) -> Load:
        """What it does now."""
        with self._lock:
            under_way = len(self._streams)
            return Load(
                waiting=max(0, under_way - self._slots),
                reading=0,
                answering=min(under_way, self._slots),
                cache_bytes=0,
                answered_tokens=self._answered,
                read_tokens=self._read,
                reused_tokens=self._reused,
            )

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> AnswerStream:
        """Ask for an answer; see `AnswerEngine.submit`.

        Raises:
            Busy, TooLong: see there.
            ApiError: llama.cpp can't do what is asked for.
        """
        check_possible(request)
        if len(request.prompt) + request.max_new > self.room:
            raise TooLong(len(request.prompt) + request.max_new, self.room)
        stream = AnswerStream(listener)
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self._streams) >= self._most:
                raise Busy(f"{self._most} requests are answered or wait already")
            self._streams.add(stream)
        threading.Thread(target=self._answer, args=(request, stream), name="llama.cpp", daemon=True).start()
        return stream

    def close(self) -> None:
        """End all answers, and the process."""
        with self._lock:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    # -- a thread for each answer -------------------------------------------------------------------------------

    def _answer(self, request: Request, stream: AnswerStream) -> None:
        place = self._place
        connection = http.client.HTTPConnection(str(place.hostname), place.port)
        try:
            ended = self._streamed(connection, request, stream)
        except Exception as error:  # whatever it is, the client is to hear that there is no more
            ended = Ended("cancelled") if stream.is_cancelled else Ended("failed", 0, error)
        finally:
            connection.close()
            with self._lock:
                self._streams.discard(stream)
        stream.put(ended)

    def _streamed(self, connection: http.client.HTTPConnection, request: Request, stream: AnswerStream) -> Ended:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        connection.request("POST", "/completion", json.dumps(body_of(request)), headers)
        held = connection.sock
        stream.on_cancel = lambda: _shut(held)  # llama.cpp then ends the answer, and the reading below, too
        if stream.is_cancelled:
            return Ended("cancelled")
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"llama.cpp refused a request ({answer.status}): {answer.read(2000).decode()}")
        told = 0
        for event in _events(answer):
            if "error" in event:
                raise RuntimeError(f"llama.cpp could not go on: {event['error']}")
            for token in tokens_of(event, told):
                if token.id in request.stops:
                    continue  # the last event says that it has stopped
                stream.put(token)
                with self._lock:
                    self._answered += 1
            if event.get("stop"):
                return self._ended(event)
            told = int(event["tokens_predicted"])
        raise RuntimeError("llama.cpp ended in the middle of an answer")

    def _ended(self, event: Mapping[str, Any]) -> Ended:
        timings = event.get("timings") or {}
        reused = int(timings.get("cache_n", 0))
        with self._lock:
            self._read += int(timings.get("prompt_n", 0))
            self._reused += reused
        reason: Reason = "length" if event.get("stop_type") == "limit" else "stop"
        return Ended(reason, reused)


def check_possible(request: Request) -> None:
    """Refuse what llama.cpp can't do as the API means it.

    Raises:
        ApiError: names the parameter.
    """
    asked = {
        "logprobs": request.top_logprobs is not None,  # it does not tell those of tokens within a sign
        "presence_penalty": request.presence != 0,  # it counts the prompt's tokens, too
        "frequency_penalty": request.frequency != 0,
    }
    if request.constraint is not None and grammar_of(request) is None:
        asked["response_format"] = True
    for name, is_asked in asked.items():
        if is_asked:
            message = f"'{name}' is not there with --backend llama.cpp; start the server without it."
            raise ApiError(400, message, code="unsupported_parameter", param=name)


def grammar_of(request: Request) -> str | None:
    """The text of the grammar that an answer is kept to, in llguidance's form; None if there is none."""
    return getattr(request.constraint, "lark", None)


def body_of(request: Request) -> dict[str, Any]:
    """A request to llama.cpp: the API's sampling and nothing of llama.cpp's own defaults."""
    body: dict[str, Any] = {
        "prompt": list(request.prompt),
        "n_predict": request.max_new,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "samplers": ["temperature", "top_p"],
        "seed": secrets.randbelow(SEEDS) if request.seed is None else request.seed % SEEDS,
        "logit_bias": [[id, number] for id, number in request.bias.items()],
        "stream": True,
        "return_tokens": True,
        "cache_prompt": True,
        "timings_per_token": False,
    }
    grammar = grammar_of(request)
    return {**body, "grammar": grammar} if grammar else body


def tokens_of(event: Mapping[str, Any], told: int) -> list[Token]:
    """The tokens of an event.

    llama.cpp waits until a sign is whole, and then tells its text and its last token alone.

    Args:
        told: how many tokens the events before it had.
    """
    ids, text = [int(id) for id in event.get("tokens") or []], str(event["content"])
    untold = max(0, int(event["tokens_predicted"]) - told - len(ids))
    if not ids:  # the last event: an answer that ends within a sign
        stopped = event.get("stop_type") == "eos"
        return [Token(UNTOLD, text="")] * (untold - 1 if stopped and untold else untold)
    if not untold:
        return [Token(id) for id in ids]
    return [*[Token(UNTOLD, text="")] * untold, *[Token(id, text="") for id in ids[:-1]], Token(ids[-1], text=text)]


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith((b"data: {", b"error: {")):
            name, _, text = line.decode("utf-8", "replace").partition(": ")
            tree = json.loads(text)
            yield tree if name == "data" else {"error": tree}


def _shut(connection: socket.socket | None) -> None:
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
