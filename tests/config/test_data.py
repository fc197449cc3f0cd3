"""The section `data`: values in every way to write them, and mistakes in one plain sentence."""

from __future__ import annotations

from typing import Any

import pytest

from phinetune.config.data import WeightedFile
from phinetune.config.run import make_config
from phinetune.errors import ConfigError


@pytest.mark.parametrize(("given", "fraction"), [("1e-1", 0.1), ("0.25", 0.25), (".5", 0.5), (0.1, 0.1)])
def test_a_fraction_may_be_a_text(given: Any, fraction: float) -> None:
    assert make_config({"data": {"train": "a.jsonl", "eval": given}}).data.eval == fraction


@pytest.mark.parametrize("given", ["5", "nan", "inf", "0", "h.jsonl", "some/set", ["a.jsonl", "b.jsonl"], None])
def test_what_is_no_fraction_stays_as_it_is(given: Any) -> None:
    assert make_config({"data": {"train": "a.jsonl", "eval": given}}).data.eval == given


def test_one_weighted_file_needs_no_list() -> None:
    section = make_config({"data": {"train": {"path": "c.jsonl", "weight": 2}}}).data
    assert section.train == [WeightedFile(path="c.jsonl", weight=2)]
    section.train = section.train  # an assignment is validated, too
    assert section.train == [WeightedFile(path="c.jsonl", weight=2)]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"eval": [0.1, "c.jsonl"]},
            "eval: entry 1: 0.1 is no text; a list names files or folders; a fraction or a split stands alone, without "
            "a list",
        ),
        (
            {"eval": ["c.jsonl", {"split": "x"}]},
            "eval: entry 2: {'split': 'x'} is no text; a list names files or folders; a fraction or a split stands "
            "alone, without a list",
        ),
        ({"eval": b"x"}, "eval: b'x' is no text; name a file"),
        ({"train": 5}, "train: 5 is no text; name a file, a datasets folder or a hub id, or a list of them"),
        (
            {"train": ["a.jsonl", None]},
            "train: entry 2: None is no text; name a file, a datasets folder or a hub id, or write {path: …, "
            "weight: 2}",
        ),
        (
            {"train": {"path": "c.jsonl", "wieght": 2}},
            "train: entry 1: there is no key `wieght`; did you mean `weight`?",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_plain_sentence(data: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"data": {"train": "a.jsonl", **data}})
    assert caught.value.problems == [f"configuration: data.{told}"]
