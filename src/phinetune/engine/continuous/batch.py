"""Conversations that are answered together, and what each step computes for them.

A conversation waits, is read (its prompt, a piece a step), and is answered (a token a step). Each step has one token of
every conversation that is answered and up to `PIECE` tokens of prompts, so that a long prompt holds nobody up.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.continuous.choosing import Chooser, choose_each
from phinetune.engine.continuous.low_rank import Adapter, Span
from phinetune.engine.continuous.prefixes import Kind, PrefixStore, as_ids, shared_length
from phinetune.engine.continuous.requests import AnswerStream, Ended, Reason, Request, Token
from phinetune.engine.continuous.shelves import Layout, RowCache, Shelf, Shelves, place_size
from phinetune.engine.continuous.step import PiecePart, ShelfPart, Step, compute
from phinetune.engine.kernels.few_rows import in_step
from phinetune.engine.packed_layers import called
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.segments import SHORTEST_SHARED

logger = logging.getLogger(__name__)

PIECE = 256  # prompt tokens a step; every step reads all the weights, so fewer tokens would make prompts slow
LOOKED_AT = 64  # waiting conversations that are compared with those that are read


@dataclass(eq=False)
class Row:
    """One conversation.

    Attributes:
        tokens: its prompt and its answer so far.
        computed: how many of them have keys and values.
        long: whether it rotates by longrope's long factors.
        cache: its keys and values while it is read.
        shelf: where they are while it is answered.
        reused: how many tokens of the prompt came from another conversation.
    """

    request: Request
    stream: AnswerStream
    chooser: Chooser = field(init=False)
    tokens: list[int] = field(init=False)
    computed: int = 0
    long: bool = False
    cache: RowCache | None = None
    shelf: Shelf | None = None
    reused: int = 0

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.request)
        self.tokens = list(self.request.prompt)

    @property
    def kind(self) -> Kind:
        return self.request.adapter, self.long

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)


class Batch:
    """All conversations of an engine. Not for several threads at once.

    Attributes:
        most_bytes: what keys and values may take.
        most_rows: how many conversations are read and answered together.
        waiting, reading, answering: the conversations; the one that came first stands first.
        taken, read, reused: tokens so far: of all answers, of prompts that were computed, and of prompts that were not.
    """

    def __init__(self, core: Any, adapters: Mapping[str, Adapter], most_rows: int, most_bytes: int) -> None:
        self.core, self.adapters = core, adapters
        self.most_rows, self.most_bytes = most_rows, most_bytes
        self.layout = Layout.of(core)
        self.short_limit = rope_limit(core.config)
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []
        self.answering: list[Row] = []
        self.taken = self.read = self.reused = 0
        self._start_over()

    def _start_over(self) -> None:
        self.shelves, self.store = Shelves(self.layout), PrefixStore()

    # -- what a conversation takes ----------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many tokens a conversation may have, by the model's positions and by memory."""
        positions = int(self.core.config.max_position_embeddings)
        tokens = self.most_bytes // self.layout.token_bytes
        while positions and positions + place_size(positions + 1) > tokens:
            positions = positions * 3 // 4
        return positions

    @property
    def bytes(self) -> int:
        """What keys and values take, those that are kept for later included."""
        return self._live_bytes() + self.store.bytes

    def _live_bytes(self) -> int:
        """Without those that are kept for later. A conversation that is read has its place on a shelf already."""
        own = sum(self._bytes_to_read(row) for row in self.reading)
        return self.shelves.bytes + own

    def _bytes_to_read(self, row: Row) -> int:
        return (len(row.tokens) + place_size(len(row.tokens) + 1)) * self.layout.token_bytes

    def _make_room(self, more: int) -> bool:
        """Drop kept states until so many more bytes fit. Returns whether they do."""
        if self._live_bytes() + more > self.most_bytes:
            self.shelves.shrink()
        if self._live_bytes() + more > self.most_bytes:
            return False
        while self.bytes + more > self.most_bytes and self.store.drop_oldest():
            pass
        return True

    # -- a step -----------------------------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        row.long = self._is_long(row)
        self.waiting.append(row)

    @torch.no_grad()
    def step(self) -> bool:
        """Compute one step. Returns whether there was anything to compute."""
        self._drop_cancelled()
        self._find_places()
        self._admit()
        pieces = list(self._pieces())
        if not self.answering and not pieces:
            return False
        step, rows = self._plan(pieces)
        with in_step():
            states = compute(self.core, step)
            logits = self._logits(states)
        for row, count in pieces:
            row.computed += count
            self.read += count
        for row in self.answering:
            row.computed += 1
        if rows:
            self._append(rows, logits)
        return True

    def fail(self, error: BaseException) -> None:
        """End all conversations that are read or answered, and begin with empty memory."""
        for row in [*self.reading, *self.answering]:
            row.stream.put(Ended("failed", row.reused, error))
        self.reading, self.answering = [], []
        self._start_over()

    def end_all(self, reason: Reason, error: BaseException | None = None) -> None:
        """End all conversations, those that wait included."""
        for row in [*self.waiting, *self.reading, *self.answering]:
            row.stream.put(Ended(reason, row.reused, error))
        self.waiting.clear()
        self.reading, self.answering = [], []
        self._start_over()

    def _logits(self, states: Tensor) -> Tensor:
        return called(self.core.get_output_embeddings(), states)

    def _drop_cancelled(self) -> None:
        for row in [row for row in (*self.reading, *self.answering) if row.stream.is_cancelled]:
            self._end(row, "cancelled")
        for row in [row for row in self.waiting if row.stream.is_cancelled]:
            self.waiting.remove(row)
            row.stream.put(Ended("cancelled"))

    # -- waiting to reading -----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin to read those that have waited longest, as far as rows and memory go."""
        for row in [self.waiting[i] for i in range(min(LOOKED_AT, len(self.waiting)))]:
            if len(self.reading) + len(self.answering) >= self.most_rows:
                return
            tokens = as_ids(row.tokens)
            shared, copy = self._known_beginning(row, tokens)
            if self._soon_known(row, tokens) >= shared + SHORTEST_SHARED:
                continue  # another one is reading the same beginning: it is there in a few steps
            if not self._make_room(self._bytes_to_read(row)):
                return
            self.waiting.remove(row)
            row.cache = RowCache(self.layout, len(row.tokens))
            if shared >= SHORTEST_SHARED:
                copy(row.cache, shared)
                row.computed = shared
                row.reused = min(shared, len(row.request.prompt))
                self.reused += row.reused
            self.reading.append(row)

    def _known_beginning(self, row: Row, tokens: Any) -> tuple[int, Callable[[RowCache, int], None]]:
        """How many first tokens have states somewhere, and what copies them. The last token is always computed."""
        found, cache = self.store.find(row.kind, tokens)
        best: RowCache | Row | None = cache
        for other in (*self.reading, *self.answering):
            if other.kind == row.kind:
                shared = min(shared_length(as_ids(other.tokens), tokens), other.computed)
                found, best = (shared, other) if shared > found else (found, best)

        def copy(into: RowCache, count: int) -> None:
            source = best.cache if isinstance(best, Row) and best.cache else best
            states = source.states if isinstance(source, RowCache) else None
            if states is None and isinstance(best, Row) and best.shelf:
                states = best.shelf.row_states(best)
            assert states is not None
            into.copy_from(states, count)

        return min(found, len(row.tokens) - 1), copy

    def _soon_known(self, row: Row, tokens: Any) -> int:
        """How many first tokens another conversation will have computed once it is read."""
        alike = [as_ids(other.tokens) for other in self.reading if other.kind == row.kind]
        return max((min(shared_length(other, tokens), len(tokens) - 1) for other in alike), default=0)

    # -- reading ----------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[Row, int]]:
        """What is read of which prompts in this step, the oldest first."""
        left = PIECE
        for row in self.reading:
            count = min(left, len(row.tokens) - row.computed)
            if not count:
                return
            yield row, count
            left -= count

    def _plan(self, pieces: list[tuple[Row, int]]) -> tuple[Step, list[Row]]:
        """The step, and the conversations that get a token from it, in the order of its wanted outputs."""
        work = [*((row, 1) for row in self.answering), *pieces]
        work.sort(key=lambda one: (one[0].request.adapter is not None, one[0].request.adapter or ""))
        step, rows, at = Step([], [], [], [], [], []), [], {}
        for row, count in work:
            start, end = len(step.ids), row.computed + count
            at[row] = start
            step.ids.extend(row.tokens[row.computed : end])
            step.positions.extend(range(row.computed, end))
            step.long.extend([row.long] * count)
            self._extend_spans(step.spans, row, start, len(step.ids))
            if row.cache:
                window = self.layout.heads.window
                step.parts.append(PiecePart.of(row.cache, start, row.computed, count, window))
            if end == len(row.tokens):
                step.wanted.append(len(step.ids) - 1)
                rows.append(row)
        for shelf in self.shelves.by_capacity.values():
            places = [row.computed for row in shelf.rows]
            step.parts.append(ShelfPart.of(shelf, [at[row] for row in shelf.rows], places))
        return step, rows

    def _extend_spans(self, spans: list[Span], row: Row, start: int, stop: int) -> None:
        name = row.request.adapter
        adapter = None if name is None else self.adapters[name]
        if spans and spans[-1].adapter is adapter:
            start = spans.pop().start
        spans.append(Span(adapter, start, stop))

    # -- answering --------------------------------------------------------------------------------------------

    def _append(self, rows: list[Row], logits: Tensor) -> None:
        """Append its next token to each conversation, and end those that are complete."""
        chosen = choose_each([row.chooser for row in rows], logits)
        for row, token in zip(rows, chosen, strict=True):
            if isinstance(token, Token):
                self._take(row, token)
            else:
                self._end(row, "failed", token)

    def _take(self, row: Row, token: Token) -> None:
        request = row.request
        if token.id in request.stops:
            self._end(row, "stop")
            return
        self.taken += 1
        row.tokens.append(token.id)
        row.stream.put(token)
        if token.last:
            self._end(row, "stop")
        elif row.answered >= request.max_new:
            self._end(row, "length")
        elif self._is_long(row) != row.long:
            self._read_again(row)
        elif row.cache:
            self._begin_to_answer(row)

    def _begin_to_answer(self, row: Row) -> None:
        assert row.cache is not None
        self.reading.remove(row)
        row.shelf = self.shelves.add(row, row.cache.states, row.computed, len(row.tokens))
        row.cache = None
        self.answering.append(row)

    def _is_long(self, row: Row) -> bool:
        return self.short_limit is not None and len(row.tokens) > self.short_limit

    def _read_again(self, row: Row) -> None:
        """A conversation longer than longrope's first limit rotates by other factors, so all its keys are new."""
        self._leave(row)
        row.long, row.computed, row.reused = True, 0, 0
        self.waiting.appendleft(row)

    def _find_places(self) -> None:
        """Move conversations that have filled their places. Where memory is short, the newest one waits again."""
        for row in list(self.answering):
            shelf = row.shelf
            if shelf is None or len(row.tokens) <= shelf.capacity:
                continue
            while not self._make_room(self.shelves.bytes_of_another(len(row.tokens))):
                newest = [*self.answering, *self.reading][-1]
                self._wait_again(newest)
                if newest is row:
                    break
            if row.shelf:
                states = shelf.row_states(row)
                self.shelves.remove(row, shelf)
                row.shelf = self.shelves.add(row, states, row.computed, len(row.tokens))

    def _wait_again(self, row: Row) -> None:
        logger.info("memory for keys and values is short: a conversation of %d tokens waits again", len(row.tokens))
        self._leave(row)
        row.computed = 0
        self.waiting.appendleft(row)

    def _end(self, row: Row, reason: Reason, error: Exception | None = None) -> None:
        self._keep(row)
        self._leave(row)
        row.stream.put(Ended(reason, row.reused, error))

    def _keep(self, row: Row) -> None:
        """Keep the states of a conversation that leaves, for those that begin like it."""
        size = row.computed * self.layout.token_bytes
        if row.computed < SHORTEST_SHARED or not self._make_room(size):
            return
        kept = RowCache(self.layout, row.computed)
        kept.copy_from(row.cache.states if row.cache else row.shelf.row_states(row), row.computed)  # type: ignore[union-attr]
        self.store.put(row.kind, as_ids(row.tokens[: row.computed]), kept)

    def _leave(self, row: Row) -> None:
        (self.reading if row in self.reading else self.answering).remove(row)
        if row.shelf:
            self.shelves.remove(row, row.shelf)
        row.cache = row.shelf = None
