"""What held-out pairs say of a model: how often it finds the chosen answer likelier, and which answers win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.encode_answers import JudgedRows, parts_of
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.scoring import Score
from phinetune.evaluation.answering import Answers
from phinetune.evaluation.bootstrap import LEVEL, Array, Units, drawn_at_a_time, resamples
from phinetune.evaluation.together import score_together


def are_pairs(rows: Sequence[Encoded]) -> bool:
    """Whether a set holds pairs of answers."""
    return bool(len(rows)) and len(rows[0].lengths) == 2


def worth_imitating(held_out: ChatSet) -> ChatSet:
    """The rows whose answers say what to answer: all, but for those that are judged not good (see `JudgedRows`).

    Where every answer is judged so, all of them are left: they are all that there is to measure.
    """
    first = held_out.encoded[0].values if len(held_out) else None
    if not first or not set(JudgedRows.columns) <= first.keys():
        return held_out
    liked = [place for place, row in enumerate(held_out.encoded) if (row.values or {})["label"] > 0.5]
    return held_out.at(liked) if 0 < len(liked) < len(held_out) else held_out


def score_pairs(
    model: Any, rows: Sequence[Encoded], batch_size: int | None, on_done: Callable[[int], None]
) -> tuple[list[Score], dict[str, Array]]:
    """The scores of the chosen answers, and for each pair what the model prefers.

    Args:
        rows: pairs: the chosen conversation, then the rejected one.
        batch_size, on_done: see `score_together`.

    Returns:
        the scores; and 100 where the model finds the chosen answer likelier, else 0: the whole answer
            (`prefers_chosen`) and the mean over its tokens (`prefers_chosen_a_token`), each of shape (rows).
    """
    sides = [[_answer_alone(parts_of(row)[i], parts_of(row)[1]) for row in rows] for i in (0, 1)]
    scored = score_together(model, [*sides[0], *sides[1]], batch_size, _halved(on_done))
    chosen, rejected = scored[: len(rows)], scored[len(rows) :]
    both = list(zip(chosen, rejected, strict=True))
    return chosen, {
        "prefers_chosen": np.array([100.0 * (a.nll < b.nll) for a, b in both]),
        "prefers_chosen_a_token": np.array([100.0 * (a.loss < b.loss) for a, b in both]),
    }


def _answer_alone(part: Encoded, rejected: Encoded) -> Encoded:
    """A conversation with labels in its answer alone, where the objective has others too.

    The rejected conversation never has labels in the prompt, so its first one says where answers begin.
    """
    start = next(i for i, label in enumerate(rejected.labels) if label != IGNORED)
    return Encoded(part.input_ids, [IGNORED] * start + part.labels[start:])


def _halved(on_done: Callable[[int], None]) -> Callable[[int], None]:
    """Tells of a row when both of its conversations are scored."""
    waiting = [0]

    def done(count: int) -> None:
        waiting[0] += count
        on_done(waiting[0] // 2)
        waiting[0] %= 2

    return done


def answer_words(answered: Answers) -> float | None:
    """How many words an answer has, the mean; None without answers."""
    answers = answered.answers
    return float(np.mean([len(answer.text.split()) for answer in answers])) if answers else None


def win_rate(
    by: str,
    base: Answers,
    tuned: Answers,
    more_is_better: bool,
    against: str = "base",
    units: Units | None = None,
) -> dict[str, Any] | None:
    """How often the tuned model's answer beats the base's by a metric; an even one counts half. With its interval.

    Args:
        by: the metric's name.
        against: what the other model is called.
        units: of each prompt, see `bootstrap.resamples`.

    Returns:
        `by`, `rate`, `low` and `high` in percent (None: too few prompts for an interval), `won`, `lost`, `even`,
            `level`, and all of it in words (`text`); None where no answer has a number.
    """
    if by not in base.numbers or by not in tuned.numbers:
        return None
    change = tuned.numbers[by] - base.numbers[by]
    has_number = ~np.isnan(change)
    change = change[has_number] * (1 if more_is_better else -1)
    if not len(change):
        return None
    points = 50.0 * (1 + np.sign(change))
    low, high = rate_interval(points, None if units is None else units[has_number])
    found = {
        "by": by,
        "against": against,
        "rate": float(points.mean()),
        "low": low,
        "high": high,
        "level": LEVEL,
        "won": int((change > 0).sum()),
        "lost": int((change < 0).sum()),
        "even": int((change == 0).sum()),
    }
    return {**found, "text": _sentence(found)}


def rate_interval(points: Array, units: Units | None = None) -> tuple[float, float] | tuple[None, None]:
    """The interval of a mean over prompts, by resampling them. None of one prompt, or one unit, which proves nothing.

    Args:
        points: of each prompt, in percent.
        units: of each prompt, see `bootstrap.resamples`.
    """
    if drawn_at_a_time(len(points), units) < 2:
        return None, None
    drawn = np.concatenate([counts @ points / counts.sum(1) for counts in resamples(len(points), units)])
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def _sentence(found: Mapping[str, Any]) -> str:
    counts = f"{found['won']} won, {found['lost']} lost, {found['even']} even"
    ends = None if found["low"] is None else f"{found['low']:.0f} to {found['high']:.0f}"
    interval = f"{found['level']}% interval {ends}" if ends else "too few for an interval"
    return f"tuned wins {found['rate']:.0f}% against {found['against']} by {found['by']} ({interval}; {counts})"
