"""Greedy answers to many prompts at once. Each has the tokens that transformers' `generate` gives for its prompt alone.

Prompts are computed as packed rows without padding; a beginning that all of them share is computed once. Their keys and
values go into one cache, which is allocated once a batch. In the cache a conversation is a row, and all rows end at the
same column, so each step writes one column. A conversation that has ended leaves the batch, and the last row moves into
its place.

    column      0 1 2 3 4 5 | 6 7 8
    row 0       . . p p p p | a a       p: prompt, a: answer, .: unused
    row 1       p p p p p p | a a
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.attention_plan import Heads
from phinetune.engine.device_memory import free_bytes
from phinetune.engine.examples import common_prefix
from phinetune.engine.kernels.few_rows import in_step
from phinetune.engine.kernels.rotary import rotate_
from phinetune.engine.packed_layers import called
from phinetune.engine.packed_model import PackedCausalLM, rope_limit
from phinetune.engine.segments import SHORTEST_SHARED

PROMPT_TOKENS = 8192  # prompt tokens computed at a time; this limits what the layers hold besides the cache
CACHE_SHARE = 0.25  # the share of the free memory that the cache may take
MOST_ROWS = 256  # conversations in a batch; more would not make the products more efficient


@dataclass
class PromptState:
    """One prompt and its answer so far, both as token ids. `place` is the prompt's place among all prompts."""

    place: int
    prompt: list[int]
    answer: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.answer]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@torch.no_grad()
def decode(
    core: PackedCausalLM,
    prompts: Sequence[list[int]],
    *,
    stops: set[int],
    limit: int,
    rows: int | None = None,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Answer each prompt by taking the likeliest token again and again.

    Args:
        core: a model with a packed form (the base inside a PEFT model), in evaluation mode.
        prompts: token ids, at least one for each prompt.
        stops: ids that end an answer. Such an id is the answer's last token.
        limit: how many tokens an answer may have.
        rows: how many prompts are answered together. None: as many as fit if their cache may take a quarter of the free
            memory.
        on_done: called with the number of answers that have just ended.

    Returns:
        the new tokens of each prompt, in the order of the prompts.
    """
    states = [PromptState(i, list(prompt)) for i, prompt in enumerate(prompts)]
    short_limit = rope_limit(core.config)
    waiting = sorted(states, key=len, reverse=True)
    while waiting:
        long = short_limit is not None and len(waiting[0]) > short_limit
        candidates = [state for state in waiting if not long or len(state) > (short_limit or 0)]
        batch = candidates[: rows or _fitting(core, len(candidates[0]) + limit)]
        taken = {state.place for state in batch}
        outgrown = _Batch(core, batch, stops, limit, None if long else short_limit).answer(on_done)
        # A conversation longer than longrope's first limit rotates by other factors, so all its keys are new.
        rest = [state for state in waiting if state.place not in taken]
        waiting = sorted([*outgrown, *rest], key=len, reverse=True)
    return [state.answer for state in states]


def _fitting(core: PackedCausalLM, columns: int) -> int:
    """How many conversations fit, if each has this many columns in the cache."""
    heads = _heads(core)
    size = 2 * core.config.num_hidden_layers * heads.kv_heads * heads.size * columns * core.dtype.itemsize
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free_bytes(core.device)) // int(size)))


def _heads(core: PackedCausalLM) -> Heads:
    first: Any = core.model.layers[0]
    heads: Heads = first.self_attn.heads
    return heads


class _Batch:
    """Conversations that are answered together.

    Attributes:
        live: those that have not ended, in the order of their rows.
        cache: keys and values, shape (layers, 2, rows, kv_heads, columns, size).
        column: the column of the next token.
        start: each live row's first column, shape (live).
        mask: what is added to scores: minus infinity before a row's start, else 0, shape (live, columns).
        padded: whether any row begins behind the first column.
        short_limit: longrope's first limit while all conversations are within it, else None.
    """

    def __init__(
        self, core: PackedCausalLM, states: list[PromptState], stops: set[int], limit: int, short_limit: int | None
    ) -> None:
        self.core, self.live, self.stops, self.limit, self.short_limit = core, states, stops, limit, short_limit
        self.heads = _heads(core)
        self.column = max(map(len, states))
        width = self.column + max(limit - len(state.answer) for state in states)
        self.start = torch.tensor([self.column - len(state) for state in states], device=core.device)
        self.cache = torch.empty(
            (core.config.num_hidden_layers, 2, len(states), self.heads.kv_heads, width, self.heads.size),
            dtype=core.dtype,
            device=core.device,
        )
        columns = torch.arange(width, device=core.device)
        before = columns < self.start[:, None]
        self.mask = torch.zeros(before.shape, dtype=core.dtype, device=core.device).masked_fill_(before, -torch.inf)
        self.padded = bool(before.any())
        positions = torch.arange(width, device=core.device)
        rope = rope_limit(core.config)
        long = rope is not None and self.column > rope
        self.cos, self.sin = (part.to(core.dtype) for part in core.model.rotation(positions, long=long))

    def answer(self, on_done: Callable[[int], None]) -> list[PromptState]:
        """Answer all conversations. Returns those that have outgrown `short_limit` and must be read again."""
        chosen = self._read_prompts()
        outgrown: list[PromptState] = []
        while True:
            before = len(outgrown)
            leaving = self._append(chosen.tolist(), outgrown)
            on_done(len(leaving) - (len(outgrown) - before))
            chosen = self._drop(leaving, chosen)
            if not self.live:
                return outgrown
            chosen = self._step(chosen)

    def _append(self, chosen: list[int], outgrown: list[PromptState]) -> list[int]:
        """Append its token to each live conversation. Returns the rows that leave the batch.

        A conversation that leaves because it has outgrown `short_limit` is added to `outgrown`.
        """
        leaving = []
        for i, (state, token) in enumerate(zip(self.live, chosen, strict=True)):
            state.answer.append(token)
            if token in self.stops or len(state.answer) >= self.limit:
                leaving.append(i)
            elif self.short_limit is not None and len(state) > self.short_limit:
                outgrown.append(state)
                leaving.append(i)
        return leaving

    def _drop(self, leaving: list[int], chosen: Tensor) -> Tensor:
        """Remove rows, and move the last rows into their places. Returns the tokens of the rows that stay."""
        if not leaving:
            return chosen
        gone, stay = set(leaving), len(self.live) - len(leaving)
        holes = [i for i in leaving if i < stay]
        movers = [i for i in range(stay, len(self.live)) if i not in gone]
        order = list(range(stay))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if movers:
            used = self.cache[..., : self.column, :]
            used[:, :, holes] = used[:, :, movers]
        self.live = [self.live[i] for i in order]
        index = torch.tensor(order, device=chosen.device, dtype=torch.long)
        self.start, self.mask = self.start[index], self.mask[index]
        return chosen[index]

    # -- the model ------------------------------------------------------------------------------------------

    def _read_prompts(self) -> Tensor:
        """Write the keys and values of all prompts into the cache. Returns each one's next token, shape (live)."""
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
        """`_read_prompts` for the rows [first, last)."""
        rows = [state.tokens for state in self.live[first:last]]
        shared = _shared(rows)
        lengths = [len(row) - shared for row in rows]
        ends = torch.tensor(lengths).cumsum(0) + shared
        starts = ends - torch.tensor(lengths)
        root = [[0, shared, -1]] if shared else []
        table = [*root, *([int(s), int(e), 0 if shared else -1] for s, e in zip(starts, ends, strict=True))]
        ids = torch.tensor([*rows[0][:shared], *(token for row in rows for token in row[shared:])])
        positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + n) for n in lengths)])
        # Where in the packed row each column's token lies. Columns before a row's start take its first token.
        place = torch.arange(self.column) - (self.column - shared) + torch.tensor(lengths)[:, None]
        at = torch.where(place < shared, place.clamp(min=0), place - shared + starts[:, None])
        device = self.core.device

        def fill(layer: int, qkv: Tensor) -> None:
            self._fill_cache(layer, qkv, at.to(device), slice(first, last))

        states = self.core.model.packed(
            ids.to(device), positions.to(device), torch.tensor(table), (ends - 1).to(device), fill
        )
        return self._choose(states)

    def _fill_cache(self, layer: int, qkv: Tensor, at: Tensor, rows: slice) -> None:
        """Copy the keys and values of a packed row into the cache.

        Args:
            at: where in the packed row the token of each column lies, shape (rows, columns).
        """
        heads = self.heads
        states = qkv.view(len(qkv), heads.total, heads.size)[:, heads.heads :]
        picked = states.index_select(0, at.flatten()).view(*at.shape, 2, heads.kv_heads, heads.size)
        self.cache[layer, :, rows, :, : self.column] = picked.permute(2, 0, 3, 1, 4)

    def _step(self, chosen: Tensor) -> Tensor:
        """Compute one more token for each live conversation.

        Args:
            chosen: the tokens that were chosen last, shape (live).

        Returns:
            the next tokens, shape (live).
        """
        with in_step():
            states = self.core.model.step(chosen, self._step_attention())
            self.column += 1
            return self._choose(states)

    def _step_attention(self) -> _StepAttention:
        window = self.heads.window
        seen = slice(0 if window is None else max(0, self.column + 1 - window), self.column + 1)
        # Copied: CUDA's attention reads a mask in words, which a window that begins at an odd column would cut.
        mask = self.mask[:, None, None, seen].contiguous() if self.padded else None
        positions = self.column - self.start
        return _StepAttention(
            self.cache, len(self.live), self.column, seen, mask, self.cos[positions], self.sin[positions]
        )

    def _choose(self, states: Tensor) -> Tensor:
        """The likeliest next token for each hidden state."""
        return called(self.core.get_output_embeddings(), states).argmax(-1)


def _shared(rows: Sequence[list[int]]) -> int:
    """How many first tokens all rows share, at least one token of each row left out; 0 if sharing is not worth it."""
    if len(rows) < 2:
        return 0
    shared = min(common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1)
    return shared if shared >= SHORTEST_SHARED else 0


@dataclass(frozen=True)
class _StepAttention:
    """The attention of one new token of each live conversation; a `phinetune.engine.packed_layers.RowAttention`.

    Attributes:
        cache: see `_Batch`.
        rows: how many conversations are live. They are the first rows of the cache.
        column: the column of the new tokens.
        seen: the columns within the window.
        mask: what is added to the scores, shape (rows, 1, 1, seen columns); None if every row begins at column 0.
        cos, sin: shape (rows, m), for the first 2·m features of each head.
    """

    cache: Tensor
    rows: int
    column: int
    seen: slice
    mask: Tensor | None
    cos: Tensor
    sin: Tensor

    def attend(self, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        """Queries that share a key head are passed as if they were tokens of one head, so no key is copied."""
        states = qkv.view(self.rows, heads.total, heads.size)
        rotate_(states[:, : heads.heads + heads.kv_heads], self.cos, self.sin)
        q, k, v = states.split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
        keys, values = self.cache[layer, :, : self.rows]
        keys[:, :, self.column], values[:, :, self.column] = k, v
        q = q.reshape(self.rows, heads.kv_heads, heads.shared, heads.size)
        k, v = keys[:, :, self.seen], values[:, :, self.seen]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=heads.scaling)
        return out.reshape(self.rows, -1)
