"""Takes the next token of each conversation: the likeliest, or one drawn from a seed of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phinetune.engine.continuous.requests import Constraint, Request, Token

FEW = 256  # of the likeliest tokens that are sorted first; most often they hold top_p already


class Chooser:
    """What one conversation needs to take its next token: its draws, its grammar, its tokens so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.constraint: Constraint | None = request.constraint() if request.constraint else None
        self.counts: Counter[int] = Counter()
        seed = request.seed if request.seed is None else request.seed % (1 << 64)
        self._draws = np.random.Generator(np.random.PCG64(seed)) if request.temperature > 0 else None

    def choose(self, logits: Tensor) -> Token:
        """The next token.

        Args:
            logits: shape (vocabulary), float32, on the CPU. They are overwritten.
        """
        request = self.request
        logprobs = None if request.top_logprobs is None else torch.log_softmax(logits, dim=-1)
        self._bend_(logits)
        taken = int(logits.argmax()) if self._draws is None else self._drawn(logits, float(self._draws.random()))
        self.counts[taken] += 1
        last = bool(self.constraint and taken not in request.stops and self.constraint.take(taken))
        return Token(taken, last=last) if logprobs is None else _told(taken, logprobs, request.top_logprobs or 0, last)

    def _bend_(self, logits: Tensor) -> None:
        request = self.request
        for token, number in request.bias.items():
            logits[token] += number
        if request.presence or request.frequency:
            for token, count in self.counts.items():
                logits[token] -= request.presence + count * request.frequency
        if self.constraint:
            self.constraint.mask_(logits)
        if self.counts.total() < request.min_new and request.stops:
            logits[torch.tensor(sorted(request.stops))] = -torch.inf

    def _drawn(self, logits: Tensor, number: float) -> int:
        """The token at `number`, in [0, 1), of the summed probabilities. Tokens are summed in the order of their ids,
        so that a last bit in which two batches differ does not change which token stands there.
        """
        wide = logits.double()
        # Seen from the likeliest one: quotients by a tiny temperature overflow on one side alone, where all is unlikely
        likely = torch.softmax((wide - wide.max()) / self.request.temperature, dim=-1)
        if self.request.top_p < 1:
            likely = likely.where(likely >= _smallest(likely, self.request.top_p), 0.0)
        summed = likely.cumsum(0)
        place = int(torch.searchsorted(summed, summed[-1] * number, right=True))
        return min(place, int(likely.nonzero()[-1]))


def _smallest(likely: Tensor, top_p: float) -> Tensor:
    """The probability of the last token among the likeliest ones that add up to `top_p`."""
    for count in (min(FEW, len(likely)), len(likely)):
        top = likely.topk(count).values
        before = top.cumsum(0) - top
        inside = before < top_p
        inside[0] = True
        if count == len(likely) or not bool(inside[-1]):
            break
    return top[int(inside.sum()) - 1]


def _told(taken: int, logprobs: Tensor, count: int, last: bool) -> Token:
    top = logprobs.topk(count) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
    return Token(taken, float(logprobs[taken]), pairs, last)


def choose_each(choosers: Sequence[Chooser], logits: Tensor) -> Iterator[Token | Exception]:
    """The next token of each conversation, for logits of shape (conversations, vocabulary).

    One whose grammar fails gives the error in its place, and the others go on.
    """
    likeliest: Any = logits.argmax(-1).tolist()
    for i, (chooser, best) in enumerate(zip(choosers, likeliest, strict=True)):
        if chooser.request.is_plain:
            yield Token(best)
            continue
        try:
            yield chooser.choose(logits[i].to("cpu", torch.float32, copy=True))
        except Exception as error:
            yield error
