"""Rows of one group, and copies, are drawn together, so that ten rows of one customer don't count as ten customers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from phinetune.config.judge import JudgeMetric
from phinetune.config.own_metrics import CustomMetric
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.copies import SetKeys
from phinetune.data.prepare.report import DataReport
from phinetune.engine.examples import Encoded
from phinetune.engine.scoring import Score
from phinetune.evaluation.answering import Answers, Question
from phinetune.evaluation.bootstrap import Difference, Pairs, differences, resamples
from phinetune.evaluation.drawn_together import DrawnTogether, group_sentences, units_of
from phinetune.evaluation.hard_rows import hard_kinds
from phinetune.evaluation.judge import Verdict, judged_tree
from phinetune.evaluation.preferences import rate_interval, win_rate
from phinetune.evaluation.set_metrics import Judged, SetMetric
from phinetune.metric_table import MEASURES
from phinetune.training.data_curve import Point, curve_tree

BY_KEY = {measure.key: measure for measure in MEASURES}
CUSTOMERS, EACH = 8, 25
UNITS = np.repeat(np.arange(CUSTOMERS), EACH)  # 200 rows of 8 customers
EFFECT = np.repeat(np.random.default_rng(1).standard_normal(CUSTOMERS), EACH)  # all rows of a customer are alike


def set_of(count: int, group: Sequence[str | None] | None, rows: Sequence[object] | None = None) -> ChatSet:
    keys = SetKeys(rows or list(range(count)), [None] * count, None, group)
    return ChatSet([], [Encoded([1, 2], [1, 2])] * count, DataReport("chats.jsonl"), keys=keys)


def width(found: Difference) -> float:
    return found.high - found.low


def of_means(change: np.ndarray[Any, Any], units: np.ndarray[Any, Any] | None) -> Difference:
    ones = np.ones(len(change))
    pairs = Pairs(0 * change, change, ones, ones)
    return differences({"x": (BY_KEY["bleu"], pairs)}, len(change), units)["x"]


def test_an_interval_over_groups_is_that_of_the_groups_means() -> None:
    over_groups, alone = of_means(EFFECT, UNITS), of_means(EFFECT[::EACH], None)
    assert (over_groups.change, over_groups.low, over_groups.high) == pytest.approx(
        (alone.change, alone.low, alone.high)
    )
    assert width(over_groups) > 3 * width(of_means(EFFECT, None))


def test_each_draw_takes_all_rows_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.evaluation.bootstrap.AT_ONCE", 1_000)
    units = np.array([7, 3, 7, 7, 1])
    parts = list(resamples(5, units))
    counts = np.concatenate(parts)
    assert len(parts) > 1
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 0] == counts[:, 3]).all()
    assert (counts[:, [0, 1, 4]].sum(1) == 3).all()


def test_one_group_gives_no_interval() -> None:
    ones = np.ones(10)
    assert differences({"x": (BY_KEY["bleu"], Pairs(ones, ones, ones, ones))}, 10, np.zeros(10, dtype=np.int64)) == {}


def test_a_rate_and_its_prompts_without_a_number() -> None:
    low, high = rate_interval(50 + 10 * EFFECT, UNITS)
    assert high - low > 3 * np.subtract(*reversed(rate_interval(50 + 10 * EFFECT)))
    before = Answers([], {"chrf": np.append(0 * EFFECT, np.nan)})
    after = Answers([], {"chrf": np.append(EFFECT, 1.0)})
    rates = [win_rate("chrf", before, after, True, units=units) for units in (None, np.append(UNITS, 99))]
    assert rates[0]
    assert rates[1]
    assert rates[1]["high"] - rates[1]["low"] > 3 * (rates[0]["high"] - rates[0]["low"])
    of_one = win_rate("chrf", before, after, True, units=np.append(0 * UNITS, 99))
    assert of_one
    assert (of_one["low"], of_one["high"]) == (None, None)
    assert "(too few for an interval; " in of_one["text"]


def test_a_judge() -> None:
    verdicts = [Verdict("tuned", "tuned") if one > 0 else Verdict("base", "base") for one in EFFECT]
    verdicts[0] = Verdict(None, None)
    one = JudgeMetric(model="a judge", url="http://127.0.0.1:1/v1")
    alone, together = judged_tree(one, verdicts), judged_tree(one, verdicts, UNITS)
    assert together["rate"] == alone["rate"]
    assert together["high"] - together["low"] > 3 * (alone["high"] - alone["low"])
    assert judged_tree(one, verdicts, np.zeros(len(verdicts), dtype=np.int64))["low"] is None


def test_a_metric_over_the_set() -> None:
    def mean(answers: Sequence[str], references: Sequence[str], messages: Any) -> float:
        return float(np.mean([float(answer) for answer in answers]))

    metric = SetMetric(CustomMetric(name="mine", compute=mean), mean)
    base, tuned = (
        Judged([str(one) for one in values], [""] * len(UNITS), [[]] * len(UNITS)) for values in (0 * EFFECT, EFFECT)
    )
    numbers = metric(base), metric(tuned)
    alone, together = (metric.differences(base, tuned, *numbers, 0.0, units)[0]["mine"] for units in (None, UNITS))
    assert width(together) > 3 * width(alone)


def test_a_kind_that_is_one_customers_is_not_clearly_worse() -> None:
    """All long rows are of one customer, whose losses are high: another customer's might not be."""
    losses = np.where(UNITS == 0, 3.0, 1.0)
    scores = [Score(nll=float(10 * loss), tokens=10, correct=0) for loss in losses]
    kinds = {"tag": ["a" if unit < 2 else "b" for unit in UNITS]}
    assert hard_kinds(scores, scores, kinds, ["?"] * len(UNITS))
    assert hard_kinds(scores, scores, kinds, ["?"] * len(UNITS), units=UNITS) == []
    assert hard_kinds(scores, scores, kinds, ["?"] * len(UNITS), units=0 * UNITS) == [], (
        "of one customer nothing is known"
    )


def test_the_points_of_a_curve() -> None:
    def points(units: np.ndarray[Any, Any] | None) -> list[Point]:
        tokens = [10] * len(EFFECT)
        return [Point(rows, (10 * (5 + EFFECT) - rows / 100).tolist(), tokens, units) for rows in (50, 100, 200, 400)]

    alone, together = (curve_tree(points(units), 6.0)["points"][0] for units in (None, UNITS))
    assert together["high"] - together["low"] > 3 * (alone["high"] - alone["low"])
    of_one = curve_tree(points(0 * UNITS), 6.0)["points"][0]
    assert (of_one["low"], of_one["high"]) == (alone["low"], alone["high"])


def test_what_belongs_together() -> None:
    assert units_of(set_of(4, None)) is None
    assert units_of(set_of(4, ["a", "b", "c", None])) is None
    units = units_of(set_of(6, ["a", "b", "a", None, None, "b"], [0, 1, 2, 3, 3, 5]))
    assert units is not None
    assert units.tolist() == [0, 1, 0, 3, 3, 1]  # 3 and 4 are copies
    questions = [Question([1], [], "?", "!", row) for row in (1, 2, 5)]
    together = DrawnTogether.of(set_of(6, ["a", "b", "a", None, None, "b"]), questions)
    assert together
    assert together.prompts.tolist() == [1, 0, 1]
    part = together.at([0, 2], [1])
    assert (part.rows.tolist(), part.prompts.tolist()) == ([0, 0], [0])


def test_pieces_and_streams_are_not_known_by_group() -> None:
    pieces = set_of(4, ["a", "a", "b", "b"])
    pieces.encoded = [*pieces.encoded, Encoded([1], [1])]
    assert units_of(pieces) is None
    assert "draw each piece by itself" in group_sentences(pieces)[0]
    assert units_of(ChatSet([], [Encoded([1], [1])] * 3, DataReport("chats.jsonl"))) is None
    assert group_sentences(ChatSet([], [Encoded([1], [1])] * 3, DataReport("chats.jsonl"))) == []


def test_what_is_said_of_groups() -> None:
    told = group_sentences(set_of(40, [str(row % 8) for row in range(40)]))
    assert told[0] == "intervals draw the 8 groups of data.group, not the 40 held-out chats one by one"
    assert told[1].startswith("only 8 groups of held-out chats (data.group): a share of right answers is known to 35")
    assert group_sentences(set_of(40, None)) == []
    assert group_sentences(set_of(40, [str(row) for row in range(40)])) == []
