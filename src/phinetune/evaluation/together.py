"""Scores and answers by all processes of a run: each takes a part of the rows, and all get all results.

What a row gets does not depend on the rows beside it, so several processes find what one finds. Where the model itself
is spread over the processes, each of its layers needs all of them at once: then all compute all rows, in step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from phinetune import processes
from phinetune.engine.examples import Encoded
from phinetune.engine.generate import BATCH, Answer, answer_prompts
from phinetune.engine.scoring import Score, score_rows
from phinetune.engine.sharding import is_sharded

OnDone = Callable[[int], None]


def score_together(
    model: Any, rows: Sequence[Encoded], batch_size: int | None, on_done: OnDone = lambda count: None
) -> list[Score]:
    """As `score_rows`, by all processes of the run. All call it, with the same rows."""
    if processes.count() == 1 or is_sharded(model):
        return score_rows(model, rows, batch_size, on_done)

    def work(places: list[int]) -> list[Any]:
        return [asdict(one) for one in score_rows(model, [rows[i] for i in places], batch_size, told)]

    told = _Told(on_done, len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    found = processes.shared_out(order, work)
    told.rest()
    return [Score(**one) for _, one in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def answer_together(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    on_done: OnDone = lambda count: None,
) -> list[Answer]:
    """As `answer_prompts`, greedily, by all processes of the run. All call it, with the same prompts."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if processes.count() > 1 and is_sharded(model):
        options["batch_size"] = batch_size or BATCH  # by the memory free they would differ, and wait for each other
        return answer_prompts(model, tokenizer, prompts, on_done=on_done, **options)
    if processes.count() == 1:
        return answer_prompts(model, tokenizer, prompts, on_done=on_done, **options)

    def work(places: list[int]) -> list[Any]:
        own = [prompts[i] for i in places]
        return [asdict(one) for one in answer_prompts(model, tokenizer, own, on_done=told, **options)] if own else []

    told = _Told(on_done, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = processes.shared_out(order, work)
    told.rest()
    made = sorted(zip(order, found, strict=True), key=lambda pair: pair[0])
    return [Answer(**{**one, "ids": tuple(one["ids"])}) for _, one in made]


class _Told:
    """Counts what this process has done, and tells of the others' work when that is there."""

    def __init__(self, on_done: OnDone, total: int) -> None:
        self.on_done, self.left = on_done, total

    def __call__(self, count: int) -> None:
        self.left -= count
        self.on_done(count)

    def rest(self) -> None:
        if self.left:
            self.on_done(self.left)
