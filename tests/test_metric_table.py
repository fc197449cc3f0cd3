"""The table of measures is what configuration, counting and README go by."""

from __future__ import annotations

import pytest

from phinetune.config.evaluation import EvaluationSection
from phinetune.config.run import describe_config, make_config
from phinetune.errors import ConfigError
from phinetune.evaluation.metrics import PAIRWISE
from phinetune.metric_table import MEASURES, METRICS, RESERVED, measured, measures_of


def test_every_metric_of_the_table_is_counted_and_no_other() -> None:
    assert tuple(PAIRWISE) == METRICS


def test_the_configuration_takes_the_metrics_of_the_table_and_says_so() -> None:
    assert EvaluationSection().metrics == list(METRICS)
    helps = {key: text for key, _, text in describe_config()}
    assert ", ".join(METRICS) in helps["evaluation.metrics"]


@pytest.mark.parametrize("name", [measure.key for measure in MEASURES])
def test_a_metric_of_the_users_own_takes_no_name_of_the_table(name: str) -> None:
    assert name in RESERVED
    with pytest.raises(ConfigError, match=f"`{name}` is the name of another number"):
        make_config({"evaluation": {"metrics": [{"name": name, "regex": "x"}]}})


def test_measures_come_in_the_order_of_the_table_and_a_users_own_behind() -> None:
    found = measures_of(["politeness", "bleu", "loss", "prompts"], less_is_better=["politeness"])
    assert [measure.key for measure in found] == ["loss", "bleu", "politeness"]
    assert not found[-1].more_is_better


def test_only_what_both_sides_have_is_compared() -> None:
    sides = {"base": {"loss": 1.0, "bleu": None}, "tuned": {"loss": 0.5, "bleu": 3.0}}
    assert [measure.key for measure in measured(sides)] == ["loss"]


@pytest.mark.parametrize(
    ("before", "after", "text", "better"),
    [
        ("loss", (2.0, 1.5), "-0.5000", True),
        ("bleu", (10.0, 8.0), "-2.0", False),
        ("repeating", (5.0, 1.0), "-4.0", True),
    ],
    ids=["loss", "bleu", "repeating"],
)
def test_a_change_is_told_with_its_direction(before: str, after: tuple[float, float], text: str, better: bool) -> None:
    (measure,) = measures_of([before])
    assert measure.change(*after) == (text, better)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["loss", "perplexity", "chrf"])
def test_a_number_that_is_not_finite_is_shown_as_such(key: str, value: float) -> None:
    (measure,) = measures_of([key])
    assert measure.amount(value) == measure.amount(value, sign=True) == "not finite"
    assert measure.change(1.0, value)[0] == "not finite"
