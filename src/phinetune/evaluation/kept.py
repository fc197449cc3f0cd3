"""What a tuned model kept of what its base could do: both are scored on neutral chats, and answer some of them.

The cost is a share of the evaluation's, but for a least number of rows without which nothing could be told. It is told.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.template import Message
from phinetune.config.data import DataSection
from phinetune.config.evaluation import EvaluationSection
from phinetune.config.row_forms import READY
from phinetune.data.neutral.neutral_rows import NeutralRow, shipped_rows
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.read.any_source import read_first
from phinetune.data.read.messages import detect_form, to_messages
from phinetune.engine.examples import Encoded
from phinetune.engine.scoring import Score
from phinetune.errors import DataError, RowError, at_most
from phinetune.evaluation.bootstrap import NOT_FINITE, Difference, Pairs, differences
from phinetune.evaluation.compare import Comparison, Side, sides_of
from phinetune.evaluation.together import answer_together, score_together
from phinetune.metric_table import Measure, measures_of

logger = logging.getLogger(__name__)

SHARE = 0.05  # of the evaluation's work, for the scored tokens and again for the answered ones: a tenth together
LEAST_ROWS = 24  # are scored in any case
LEAST_ANSWERS = 6  # are given in any case, where prompts are answered at all
ANSWER_TOKENS = 32  # most tokens of an answer: enough to see whether it is right
ANSWER_FACTOR = 4  # what a token of an answer takes of what scoring one takes, roughly
MOST_OWN = 500  # rows of a user's own set that are read
SMALL_RISE = 0.1  # nats a token, a tenth more perplexity; a rise that may be larger is not called kept
SHIPPED = ""  # the name of the set that comes with phinetune
RIGHT = Measure("right", "answers right %", "{:.1f}", True)


@dataclass(frozen=True)
class Kept:
    """What was kept, side by side.

    Attributes:
        results: by model `loss` (nats a labelled token) and, of the answers, `right` in percent.
        differences: by measure tuned minus base with its interval.
        by_tag: by tag how many `rows`, and the loss of each model.
        rows, answers: how many were scored and answered.
        share: of the evaluation's time that this took.
    """

    results: dict[str, dict[str, float]]
    differences: dict[str, Difference]
    by_tag: dict[str, dict[str, Any]]
    rows: int
    answers: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it; null where a number is not finite."""
        return {
            "results": {name: _finite(numbers) for name, numbers in self.results.items()},
            "differences": {key: _finite(one.to_dict()) for key, one in self.differences.items()},
            "by_tag": {tag: {k: _finite(v) if isinstance(v, dict) else v for k, v in numbers.items()}
                       for tag, numbers in self.by_tag.items()},
            "rows": self.rows,
            "answers": self.answers,
            "share": round(self.share, 3),
            "text": kept_sentence(self.differences.get("loss"), self.rows) + self._answers(),
        }  # fmt: skip

    def _answers(self) -> str:
        right = self.differences.get("right")
        return f" Answers right: {right.text}." if right else ""


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def kept_sentence(loss: Difference | None, rows: int) -> str:
    """What the loss on neutral chats says, in words."""
    if loss is None:
        return f"On {rows} neutral chats nothing can be said of what the model forgot."
    if loss.verdict == NOT_FINITE:
        return (
            f"Not finite: on {rows} neutral chats a model has no finite loss, so nothing can be said of what it forgot."
        )
    if loss.verdict == "worse":
        return (
            f"Forgotten: on {rows} neutral chats the loss is {loss.text}. "
            "`data.replay: 0.1` mixes the base's own answers into the rows, so that less is forgotten."
        )
    if loss.verdict == "better":
        return f"Kept: on {rows} neutral chats nothing is lost; the loss is {loss.text}."
    if loss.high > SMALL_RISE:
        return (
            f"Can't be told: on {rows} neutral chats the loss shows {loss.text}, which does not rule out that much was "
            "forgotten; `evaluation.neutral` takes more chats."
        )
    return f"Kept: on {rows} neutral chats the loss shows {loss.text}."


def measure_kept(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: ChatSet,
    section: EvaluationSection,
    base: Side | None,
    answered: int,
    seconds: float,
) -> Kept | None:
    """Score both models on the neutral chats, and let them answer some. None without an adapter, or if switched off.

    Args:
        held_out: what the evaluation was made on; the work allowed follows from it.
        base: see `phinetune.evaluation.compare.compare`.
        answered: tokens that a model answered the held-out prompts with.
        seconds: that the evaluation took.

    Raises:
        DataError: a set that the user names can't be read.
    """
    models = sides_of(model, base)
    sets = neutral_sets(section)
    if len(models) < 2 or not sets:
        return None
    began = time.perf_counter()
    encoder = make_encoder(tokenizer, "assistant", "keep")
    work = held_out.report.tokens + ANSWER_FACTOR * answered  # of each side of the evaluation
    budget = SHARE * work / len(sets)
    portions = [_portion(name, rows, encoder, budget) for name, rows in sets.items()]
    chats = [chat for portion in portions for chat in portion.chats]
    asks = section.generate and answered
    asked = [row for portion in portions for row in answered_rows(portion.rows, budget)] if asks else []
    size = None if section.batch_size == "auto" else section.batch_size
    losses, right = {}, {}
    for name, opened in models.items():
        with opened() as one:
            losses[name] = score_together(one, chats, size)
            right[name] = _right(one, tokenizer, encoder, asked)
    took = time.perf_counter() - began
    kept_rows = [row for portion in portions for row in portion.rows]
    return _kept(losses, right, kept_rows, took / max(1e-9, took + seconds))


@dataclass(frozen=True)
class _Portion:
    """The rows of a set that are scored, and the same as token ids."""

    rows: list[NeutralRow]
    chats: list[Encoded]


def _portion(name: str, rows: Sequence[NeutralRow], encoder: ChatEncoder, budget: float) -> _Portion:
    """What fits the budget of tokens. A line in the log tells what of a user's own set does not."""
    chats = encoder.encode([encoder.prepare(list(row.messages)) for row in rows])
    places = scored_places([len(one.input_ids) for one in chats], budget)
    if name != SHIPPED and (len(places) < len(rows) or len(rows) == MOST_OWN):
        logger.info(
            "evaluation.neutral: %s: its first %d chats are scored, so that this takes little of the time; %d are read "
            "at most",
            *(name, len(places), MOST_OWN),
        )
    return _Portion([rows[place] for place in places], [chats[place] for place in places])


def with_kept(
    comparison: Comparison,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: ChatSet,
    section: EvaluationSection,
    base: Side | None,
    began: float,
) -> Comparison:
    """The comparison with what was kept beside what was gained.

    Args:
        began: `time.perf_counter()` of when the comparison began.
    """
    seconds = time.perf_counter() - began
    answered = _answer_tokens(comparison, tokenizer)
    kept = measure_kept(model, tokenizer, held_out, section, base, answered, seconds)
    return replace(comparison, kept=kept.to_dict()) if kept else comparison


def neutral_sets(section: EvaluationSection) -> dict[str, list[NeutralRow]]:
    """The chats of the user's own files by their names, and then those that are shipped; none if it is switched off.

    Raises:
        DataError: a file can't be read, or has no usable row; all files are looked at.
    """
    if section.neutral is False:
        return {}
    named = (
        [] if section.neutral is True else [section.neutral] if isinstance(section.neutral, str) else section.neutral
    )
    sets, problems = {}, []
    for name in named:
        try:
            sets[name] = _own_rows(name)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return {**sets, SHIPPED: list(shipped_rows())}


def _own_rows(name: str) -> list[NeutralRow]:
    rows, problems = read_first(name, DataSection.model_fields["split"].default, MOST_OWN)
    found = []
    for row in rows:
        try:
            form = detect_form(row.fields)
            messages: list[Message] = [] if form in READY else to_messages(row.fields, form)
        except RowError as error:
            problems.append(f"{row.where}: {error}")
            continue
        expect = row.fields.get("expect")
        try:
            re.compile(str(expect or ""))
        except re.error as error:
            problems.append(f"{row.where}: expect: {expect!r} is no pattern: {error}")
        if any(message["role"] == "assistant" for message in messages):
            found.append(NeutralRow(Path(name).stem, tuple(messages), str(expect) if expect else None))
    if problems or not found:
        raise DataError(
            [*at_most(problems), f"evaluation.neutral: {name}: a chat with an answer is wanted in each row"]
        )
    return found


def _answer_tokens(comparison: Comparison, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model answered with, the mean of both."""
    texts = [text for example in comparison.examples for text in example.answers.values()]
    return len([token for ids in tokenizer(texts)["input_ids"] for token in ids]) // 2 if texts else 0


def scored_places(lengths: Sequence[int], budget: float) -> list[int]:
    """The places of the first rows that fit the budget of tokens, `LEAST_ROWS` at least."""
    total, places = 0, []
    for place, length in enumerate(lengths):
        total += length
        if total > budget and place >= LEAST_ROWS:
            break
        places.append(place)
    return places


def answered_rows(rows: Sequence[NeutralRow], budget: float) -> list[NeutralRow]:
    """The rows that are answered as well: those whose answers a pattern can judge, as far as the budget allows."""
    most = max(LEAST_ANSWERS, int(budget / (ANSWER_FACTOR * ANSWER_TOKENS)))
    return [row for row in rows if row.expect][:most]


def _right(
    model: Any, tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder, asked: Sequence[NeutralRow]
) -> list[float]:
    """100 for each answer that contains what is expected, else 0."""
    if not asked:
        return []
    prompts = [encoder.prompt_ids(encoder.prepare(list(row.messages[:-1]))) for row in asked]
    answers = answer_together(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)
    pairs = zip(asked, answers, strict=True)
    return [100.0 * bool(re.search(row.expect or "", answer.text, re.IGNORECASE)) for row, answer in pairs]


def _kept(
    losses: Mapping[str, list[Score]], right: Mapping[str, list[float]], rows: Sequence[NeutralRow], share: float
) -> Kept:
    answers = len(right["base"])
    results = {
        name: {"loss": sum(scores, Score()).loss, **({"right": float(np.mean(right[name]))} if answers else {})}
        for name, scores in losses.items()
    }
    (loss,) = measures_of(["loss"])
    found = differences({"loss": (loss, _pairs(losses))}, len(rows))
    if answers:
        ones = np.ones(answers)
        both = Pairs(np.array(right["base"]), np.array(right["tuned"]), ones, ones)
        found |= differences({"right": (RIGHT, both)}, answers)
    by_tag: dict[str, dict[str, Any]] = {}
    for tag in dict.fromkeys(row.tag for row in rows):
        places = [place for place, row in enumerate(rows) if row.tag == tag]
        own = {name: {"loss": sum((scores[i] for i in places), Score()).loss} for name, scores in losses.items()}
        by_tag[tag] = {"rows": len(places), **own}
    return Kept(results, found, by_tag, len(rows), answers, share)


def _pairs(losses: Mapping[str, list[Score]]) -> Pairs:
    def column(side: str, name: str) -> Any:
        return np.array([getattr(score, name) for score in losses[side]], dtype=np.float64)

    sums, tokens = ([column(side, name) for side in ("base", "tuned")] for name in ("nll", "tokens"))
    return Pairs(sums[0], sums[1], tokens[0], tokens[1])
