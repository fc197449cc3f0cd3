"""Metrics of the user's own, as the configuration takes them and writes them down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import TINY
from phinetune.config.own_metrics import KINDS, CustomMetric
from phinetune.config.places import with_absolute_places
from phinetune.config.run import dump_config, make_config
from phinetune.errors import ConfigError
from phinetune.training.prepare import settle


def polite(answer: str, reference: str) -> bool:
    return "please" in answer


def section(*metrics: Any) -> Any:
    return make_config({"evaluation": {"metrics": list(metrics)}})


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ({"name": "x"}, f"give one of {', '.join(KINDS)}"),
        ({"name": "x", "regex": "a", "sql": "prompt"}, "give one of .*, not regex and sql"),
        ({"name": "x", "compute": "here"}, "write it as module:function or file.py:function, not here"),
        ({"name": "x", "classes": ["one"]}, "name two labels or more"),
        ({"name": "x", "classes": ["Yes", "yes "]}, "name two labels or more, none of them empty or twice"),
        ({"name": "json", "compute": "a.py:b"}, "its numbers are called json_…, and `json_fields` is another"),
        ({"name": "x", "regex": "a", "resamples": 100}, "`resamples` is for `compute`"),
        ({"name": "x", "compute": "a.py:b", "resamples": 3}, "it is auto, 0, or a number from 20 to 10,000, not 3"),
        ({"name": "x", "regex": "a", "less_is_better": ["x"]}, "`less_is_better` is true or false here"),
        ({"name": "x", "komputer": "a.py:b"}, "there is no key `komputer`; did you mean `compute`"),
        (lambda a, b: 1, "has no name; write {name: …, function: …}"),
    ],
)
def test_a_mistake_is_named(metric: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        section(metric)


def test_a_function_is_given_in_python_and_written_down_by_its_place() -> None:
    config = section(polite, {"name": "own", "compute": polite})
    assert [metric.name for metric in config.evaluation.own] == ["polite", "own"]
    assert with_absolute_places(config).evaluation.own[0].called.function is polite
    written = yaml.safe_load(dump_config(config))["evaluation"]["metrics"]
    assert [one["function"] or one["compute"] for one in written] == [f"{__name__}:polite"] * 2
    again = make_config({"evaluation": {"metrics": written}})
    assert again.evaluation.own[0].called == f"{__name__}:polite"


def test_files_of_metrics_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.sql", "b.json", "c.py", "d"):
        (tmp_path / name).touch()
    metrics = [
        {"name": "a", "sql": "a.sql"},
        {"name": "a2", "sql": "prompt"},
        {"name": "b", "json_schema": "b.json"},
        {"name": "b2", "json_schema": {"type": "object"}},
        {"name": "c", "compute": "c.py:f"},
        {"name": "d", "similarity": "d"},
        {"name": "e", "similarity": "someone/encoder"},
    ]
    made = with_absolute_places(section(*metrics)).evaluation.own
    wanted = [*("a.sql", "prompt", "b.json", {"type": "object"}, "c.py:f", "d", "someone/encoder")]
    wanted = [str(tmp_path / one) if one in ("a.sql", "b.json", "c.py:f", "d") else one for one in wanted]
    assert [getattr(one, one.kind) for one in made] == wanted


def test_its_numbers_are_known_by_their_keys() -> None:
    sorted_, whole = CustomMetric(name="topic", classes="auto"), CustomMetric(name="own", compute="a.py:b")
    assert sorted_.keys == ["topic_accuracy", "topic_macro_f1"]
    assert [sorted_.gives(key) for key in ("topic_macro_f1", "topic")] == [True, False]
    assert [whole.gives(key) for key in ("own", "own_f1", "owned")] == [True, True, False]


def test_a_best_checkpoint_may_go_by_a_metric_over_the_set(chats: Path, tmp_path: Path) -> None:
    def settled(name: str) -> Any:
        return settle(
            make_config(
                {
                    "model": TINY,
                    "data": {"train": str(chats), "eval": 0.1},
                    "training_config": {
                        "output_dir": str(tmp_path / "run"),
                        "eval_strategy": "steps",
                        "eval_steps": 2,
                        "metric_for_best_model": name,
                    },
                    "evaluation": {
                        "metrics": [
                            {"name": "own", "compute": "a.py:b", "less_is_better": ["wer"]},
                            {"name": "topic", "classes": ["a", "b"]},
                        ]
                    },
                }
            )
        ).settings.training["greater_is_better"]

    assert [settled(name) for name in ("own_f1", "own_wer", "topic_macro_f1")] == [True, False, True]
    with pytest.raises(ConfigError, match="no evaluation counts `topic`"):
        settled("topic")
