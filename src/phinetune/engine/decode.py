"""Greedy answers to many prompts at once, token by token those of transformers' `generate` one by one.

Prompts are computed as packed rows without padding, what they begin with in common once. Their keys and values go
into one cache that is made once a batch: conversations side by side, each ending at the same column, so a step writes
one column. A conversation that has ended leaves the batch: the last one moves into its place.

    column      0 1 2 3 4 5 | 6 7 8
    row 0       . . p p p p | a a       p: prompt, a: answer, .: never looked at
    row 1       p p p p p p | a a
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.chat.template import common_prefix
from phinetune.engine.attention_plan import Heads
from phinetune.engine.kernels.rotary import rotate_
from phinetune.engine.memory import free_bytes
from phinetune.engine.phi3 import Phi3ForCausalLM, rope_limit

PROMPT_TOKENS = 8192  # computed at a time while prompts are read: bounds what the layers hold besides the cache
SHORTEST = 16  # tokens that prompts must begin with in common to be worth a segment of their own
CACHE_SHARE = 0.25  # of the free memory
MOST_ROWS = 256  # by then every product is as good as it gets


@dataclass
class PromptState:
    """One prompt, its place among those asked, and what has been answered so far."""

    place: int
    prompt: list[int]
    made: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.made]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.made)


@torch.no_grad()
def decode(
    core: Phi3ForCausalLM,
    prompts: Sequence[list[int]],
    *,
    stops: set[int],
    limit: int,
    rows: int | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The likeliest token again and again, for each prompt.

    Args:
        core: a model with a packed form (the base inside a PEFT model), in evaluation mode.
        prompts: token ids, each at least one.
        stops: ids that end an answer; they are its last token.
        limit: tokens an answer may have.
        rows: prompts answered together; None: as many as their cache fits into a quarter of the free memory.
        on_done: told of answers that have ended.

    Returns:
        each prompt's new tokens, in the order of the prompts.
    """
    asked = [PromptState(i, list(prompt)) for i, prompt in enumerate(prompts)]
    change = rope_limit(core.config)
    waiting = sorted(asked, key=len, reverse=True)
    while waiting:
        long = change is not None and len(waiting[0]) > change
        alike = [one for one in waiting if not long or len(one) > (change or 0)]
        batch = alike[: rows or _fitting(core, len(alike[0]) + limit)]
        taken = {one.place for one in batch}
        crossed = _Batch(core, batch, stops, limit, None if long else change).answer(on_done)
        # Longrope turns every key of a conversation that has outgrown its first limit by other factors.
        waiting = sorted([*crossed, *(one for one in waiting if one.place not in taken)], key=len, reverse=True)
    return [one.made for one in asked]


def _fitting(core: Phi3ForCausalLM, columns: int) -> int:
    """Conversations whose cache of that many columns fits."""
    heads = _heads(core)
    size = 2 * core.config.num_hidden_layers * heads.kv_heads * heads.size * columns * core.dtype.itemsize
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free_bytes(core.device)) // size))


def _heads(core: Phi3ForCausalLM) -> Heads:
    first: Any = core.model.layers[0]
    heads: Heads = first.self_attn.heads
    return heads


class _Batch:
    """Conversations that are answered side by side.

    Attributes:
        live: those that have not ended, in the order of their rows.
        store: keys and values, shape (layers, 2, rows, kv_heads, columns, size).
        column: where the next token goes.
        start: each live row's first column, shape (live).
        turns: longrope's first limit while all are below it, else None.
    """

    def __init__(
        self, core: Phi3ForCausalLM, asked: list[PromptState], stops: set[int], limit: int, turns: int | None
    ) -> None:
        self.core, self.live, self.stops, self.limit, self.turns = core, asked, stops, limit, turns
        self.heads = _heads(core)
        self.column = max(map(len, asked))
        room = self.column + max(limit - len(one.made) for one in asked)
        self.start = torch.tensor([self.column - len(one) for one in asked], device=core.device)
        self.store = torch.empty(
            (core.config.num_hidden_layers, 2, len(asked), self.heads.kv_heads, room, self.heads.size),
            dtype=core.dtype,
            device=core.device,
        )
        columns = torch.arange(room, device=core.device)
        before = columns < self.start[:, None]
        self.hidden = torch.zeros(before.shape, dtype=core.dtype, device=core.device).masked_fill_(before, -torch.inf)
        self.padded = bool(before.any())
        positions = torch.arange(room, device=core.device)
        rope = rope_limit(core.config)
        long = rope is not None and self.column > rope
        self.cos, self.sin = (part.to(core.dtype) for part in core.model.rotation(positions, long=long))

    def answer(self, on_done: Callable[[int], None]) -> list[PromptState]:
        """Answer all; returns those that have to be read again by longrope's long factors."""
        chosen = self._read()
        crossed: list[PromptState] = []
        while True:
            before = len(crossed)
            leaving = self._append(chosen.tolist(), crossed)
            on_done(len(leaving) - (len(crossed) - before))
            chosen = self._drop(leaving, chosen)
            if not self.live:
                return crossed
            chosen = self._step(chosen)

    def _append(self, chosen: list[int], crossed: list[PromptState]) -> list[int]:
        """Give every live row its token; the rows that leave."""
        leaving = []
        for i, (one, token) in enumerate(zip(self.live, chosen, strict=True)):
            one.made.append(token)
            if token in self.stops or len(one.made) >= self.limit:
                leaving.append(i)
            elif self.turns is not None and len(one) > self.turns:
                crossed.append(one)
                leaving.append(i)
        return leaving

    def _drop(self, leaving: list[int], chosen: Tensor) -> Tensor:
        """Close the gaps of rows that leave with the last ones; the tokens of those that stay."""
        if not leaving:
            return chosen
        gone, stay = set(leaving), len(self.live) - len(leaving)
        holes = [i for i in leaving if i < stay]
        movers = [i for i in range(stay, len(self.live)) if i not in gone]
        order = list(range(stay))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if movers:
            used = self.store[..., : self.column, :]
            used[:, :, holes] = used[:, :, movers]
        self.live = [self.live[i] for i in order]
        index = torch.tensor(order, device=chosen.device, dtype=torch.long)
        self.start, self.hidden = self.start[index], self.hidden[index]
        return chosen[index]

    # -- the model ------------------------------------------------------------------------------------------

    def _read(self) -> Tensor:
        """All prompts' keys and values into the cache; each one's next token, shape (live)."""
        chosen, first = [], 0
        while first < len(self.live):
            last, tokens = first, 0
            while last < len(self.live) and (last == first or tokens + len(self.live[last]) <= PROMPT_TOKENS):
                tokens += len(self.live[last])
                last += 1
            chosen.append(self._read_portion(first, last))
            first = last
        return torch.cat(chosen)

    def _read_portion(self, first: int, last: int) -> Tensor:
        rows = [one.tokens for one in self.live[first:last]]
        shared = _shared(rows)
        lengths = [len(row) - shared for row in rows]
        ends = torch.tensor(lengths).cumsum(0) + shared
        starts = ends - torch.tensor(lengths)
        root = [[0, shared, -1]] if shared else []
        table = [*root, *([int(s), int(e), 0 if shared else -1] for s, e in zip(starts, ends, strict=True))]
        ids = torch.tensor([*rows[0][:shared], *(token for row in rows for token in row[shared:])])
        positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + n) for n in lengths)])
        # Where each column's token lies in the packed row; the first token stands for columns before the start.
        place = torch.arange(self.column) - (self.column - shared) + torch.tensor(lengths)[:, None]
        at = torch.where(place < shared, place.clamp(min=0), place - shared + starts[:, None])
        device = self.core.device

        def keep(layer: int, qkv: Tensor) -> None:
            self._keep(layer, qkv, at.to(device), slice(first, last))

        states = self.core.model.packed(
            ids.to(device), positions.to(device), torch.tensor(table), (ends - 1).to(device), keep
        )
        return self._choose(states)

    def _keep(self, layer: int, qkv: Tensor, at: Tensor, rows: slice) -> None:
        """Keys and values of a packed row into the cache; `at`: shape (rows, columns)."""
        heads = self.heads
        states = qkv.view(len(qkv), heads.total, heads.size)[:, heads.heads :]
        found = states.index_select(0, at.flatten()).view(*at.shape, 2, heads.kv_heads, heads.size)
        self.store[layer, :, rows, :, : self.column] = found.permute(2, 0, 3, 1, 4)

    def _step(self, chosen: Tensor) -> Tensor:
        """One more token for every live row: `chosen` (live) in, the next ones out."""
        states = self.core.model.step(chosen, self._row())
        self.column += 1
        return self._choose(states)

    def _row(self) -> _StepAttention:
        window = self.heads.window
        seen = slice(0 if window is None else max(0, self.column + 1 - window), self.column + 1)
        hidden = self.hidden[:, None, None, seen] if self.padded else None
        positions = self.column - self.start
        return _StepAttention(
            self.store, len(self.live), self.column, seen, hidden, self.cos[positions], self.sin[positions]
        )

    def _choose(self, states: Tensor) -> Tensor:
        head: Any = self.core.get_output_embeddings()  # type: ignore[no-untyped-call]
        chosen: Tensor = head(states).argmax(-1)
        return chosen


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with in common, every row keeping one of its own; 0 where it isn't worth it."""
    if len(rows) < 2:
        return 0
    shared = min(common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)
    return shared if shared >= SHORTEST else 0


@dataclass(frozen=True)
class _StepAttention:
    """One token of each live conversation, as `phinetune.engine.phi3.RowAttention` has it.

    Attributes:
        rows: live conversations, the first of the store.
        seen: columns within the window.
        hidden: what is added to the scores, minus infinity before a row's start, shape (rows, 1, 1, seen).
        cos, sin: shape (rows, m).
    """

    store: Tensor
    rows: int
    column: int
    seen: slice
    hidden: Tensor | None
    cos: Tensor
    sin: Tensor

    def attend(self, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        """The queries that share a key stand as one conversation's tokens, so no key is repeated."""
        states = qkv.view(self.rows, heads.total, heads.size)
        rotate_(states[:, : heads.heads + heads.kv_heads], self.cos, self.sin)
        q, k, v = states.split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
        keys, values = self.store[layer, :, : self.rows]
        keys[:, :, self.column], values[:, :, self.column] = k, v
        q = q.reshape(self.rows, heads.kv_heads, heads.shared, heads.size)
        k, v = keys[:, :, self.seen], values[:, :, self.seen]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden, scale=heads.scaling)
        return out.reshape(self.rows, -1)
