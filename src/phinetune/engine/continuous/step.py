"""One step of the decoder over tokens of many conversations: one token of each that is answered, and pieces of prompts.

All tokens pass through the layers together, so the weights are read once. Only attention knows whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.attention_plan import Heads
from phinetune.engine.continuous.low_rank import Places, Span, kept_spans, product
from phinetune.engine.continuous.shelves import RowCache, Shelf
from phinetune.engine.kernels.rotary import rotate_
from phinetune.engine.kernels.swiglu import swiglu


@dataclass(frozen=True)
class ShelfPart:
    """One new token of each conversation on a shelf.

    Attributes:
        at: where the step has the token of each slot, shape (slots in use).
        positions: the position of each token in its conversation, same shape.
        seen: columns of the shelf that at least one of them sees.
        mask: what is added to scores, shape (slots in use, 1, 1, seen columns); None if all see all of these.
    """

    shelf: Shelf
    at: Tensor
    positions: Tensor
    seen: slice
    mask: Tensor | None

    @classmethod
    def of(cls, shelf: Shelf, at: Sequence[int], places: Sequence[int]) -> ShelfPart:
        layout, window = shelf.layout, shelf.layout.heads.window
        positions = torch.tensor(places, device=layout.device)
        first = 0 if window is None else max(0, min(places) + 1 - window)
        seen = slice(first, max(places) + 1)
        columns = torch.arange(seen.start, seen.stop, device=layout.device)
        unseen = columns > positions[:, None]
        if window is not None:
            unseen |= columns <= positions[:, None] - window
        mask = None
        if bool(unseen.any()):
            mask = torch.zeros(unseen.shape, dtype=layout.dtype, device=layout.device)
            mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]
        return cls(shelf, torch.tensor(at, device=layout.device), positions, seen, mask)

    def attend(self, layer: int, states: Tensor, heads: Heads) -> Tensor:
        """Queries that share a key head are passed as if they were tokens of one head, so no key is copied."""
        q, k, v = states[self.at].split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
        used = len(self.at)
        keys, values = self.shelf.states[layer][:, :used]
        slots = torch.arange(used, device=k.device)
        keys[slots, :, self.positions], values[slots, :, self.positions] = k, v
        q = q.reshape(used, heads.kv_heads, heads.shared, heads.size)
        k, v = keys[:, :, self.seen], values[:, :, self.seen]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=heads.scaling)
        return out.reshape(used, -1)


@dataclass(frozen=True)
class PiecePart:
    """Neighbouring tokens of one prompt.

    Attributes:
        cache: has the states of the tokens before, and gets those of these.
        at: where the step has the tokens.
        first: the position of the first one.
        mask: which keys each token sees, shape (tokens, keys); None: causal, and these are the first tokens.
    """

    cache: RowCache
    at: slice
    first: int
    mask: Tensor | None

    @classmethod
    def of(cls, cache: RowCache, start: int, first: int, tokens: int, window: int | None) -> PiecePart:
        end, mask = first + tokens, None
        if first or (window is not None and end > window):
            device = cache.states.device
            own, keys = torch.arange(first, end, device=device)[:, None], torch.arange(end, device=device)
            mask = keys <= own
            if window is not None:
                mask &= keys > own - window
        return cls(cache, slice(start, start + tokens), first, mask)

    def attend(self, layer: int, states: Tensor, heads: Heads) -> Tensor:
        own = states[self.at].transpose(0, 1)
        q, k, v = own.split([heads.heads, heads.kv_heads, heads.kv_heads])
        keys, values = self.cache.states[layer]
        end = self.first + q.shape[1]
        keys[:, self.first : end], values[:, self.first : end] = k, v
        out = F.scaled_dot_product_attention(
            *(q[None], keys[None, :, :end], values[None, :, :end]),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=heads.scaling,
            enable_gqa=heads.shared > 1,
        )
        return out[0].transpose(0, 1).reshape(q.shape[1], -1)


@dataclass(frozen=True)
class Step:
    """The tokens of a step.

    Attributes:
        ids, positions: of each token, which lie side by side by their adapter.
        long: which conversations rotate by longrope's long factors, for each token.
        spans: which adapter answers which tokens.
        parts: how they attend. Each token is in one part.
        wanted: the tokens whose output is wanted, in order.
    """

    ids: list[int]
    positions: list[int]
    long: list[bool]
    spans: list[Span]
    parts: list[ShelfPart | PiecePart]
    wanted: list[int]


def compute(core: Any, step: Step) -> Tensor:
    """The decoder's output for the wanted tokens, after the last norm; shape (wanted, width)."""
    model, device = core.model, core.device
    hidden = model.embed_tokens(torch.tensor(step.ids, device=device))
    cos, sin = (part.to(hidden.dtype) for part in _rotation(model, step, device))
    attend = _Attention(step.parts, cos, sin, model.layers[0].self_attn.heads)
    last, places = len(model.layers) - 1, Places.of(core.config)
    for i, layer in enumerate(model.layers):
        hidden = _layer(layer, i, places, hidden, attend, step.spans, step.wanted if i == last else None)
    return model.norm(hidden)  # type: ignore[no-any-return]


def _rotation(model: Any, step: Step, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.tensor(step.positions, device=device)
    cos, sin = model.rotation(positions, long=False)
    if any(step.long):
        is_long = torch.tensor(step.long, device=device)
        cos[is_long], sin[is_long] = model.rotation(positions[is_long], long=True)
    return cos, sin


@dataclass(frozen=True)
class _Attention:
    parts: Sequence[ShelfPart | PiecePart]
    cos: Tensor
    sin: Tensor
    heads: Heads

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention for qkv of shape (tokens, features); queries and keys in it are rotated in place."""
        heads = self.heads
        states = qkv.view(len(qkv), heads.total, heads.size)
        rotate_(states[:, : heads.heads + heads.kv_heads], self.cos, self.sin)
        out = qkv.new_empty(len(qkv), heads.heads * heads.size)
        for part in self.parts:
            out[part.at] = part.attend(layer, states, heads)
        return out


def _layer(
    layer: Any,
    number: int,
    places: Places,
    hidden: Tensor,
    attend: Callable[[int, Tensor], Tensor],
    spans: Sequence[Span],
    wanted: list[int] | None,
) -> Tensor:
    """One decoder layer; only the wanted tokens' output, if they are given."""
    qkv = product(layer.input_layernorm(hidden), layer, number, places.attention, spans)
    out = attend(number, qkv)
    if wanted is not None and not wanted:  # the prompts' states are written, and that was all
        return hidden[:0]
    if wanted is not None and len(wanted) < len(hidden):
        index = torch.tensor(wanted, device=hidden.device)
        hidden, out, spans = hidden[index], out[index], kept_spans(spans, wanted)
    hidden = hidden + product(out, layer, number, [places.o], spans)
    normed = layer.post_attention_layernorm(hidden)
    active = swiglu(product(normed, layer, number, places.mlp, spans))
    return hidden + product(active, layer, number, [places.down], spans)
