"""Regular expressions without an end are refused within their time, and broken ones in a sentence."""

from __future__ import annotations

import time
from typing import Any

import pytest

from phinetune.checkpoints.patterns import why_no_end

NAMES = [f"model.layers.{number}.self_attn.qkv_proj" for number in range(4)]
LETTERS = ["a" * 60]


@pytest.mark.parametrize(
    ("peft", "place"),
    [
        ({"target_modules": "(a|a)*b"}, r"target_modules: `(a|a)*b`"),
        ({"target_modules": "(a+)+b"}, r"target_modules: `(a+)+b`"),
        ({"exclude_modules": "(.*)*x"}, "exclude_modules: `(.*)*x`"),
        ({"rank_pattern": {"down_proj": 4, "(a*)*b": 4}}, "rank_pattern: `(a*)*b`"),
        ({"alpha_pattern": {"(a|aa)+b": 4.0}}, "alpha_pattern: `(a|aa)+b`"),
        ({"modules_to_save": ["lm_head", "(a|aa|a)*b"]}, "modules_to_save: `(a|aa|a)*b`"),
        ({"layers_pattern": ["(a+)*b"]}, "layers_pattern: `(a+)*b`"),
        ({"layers_pattern": "(?:a|a)+b"}, "layers_pattern: `(?:a|a)+b`"),
        ({"target_modules": ".*" * 40 + "x"}, "target_modules: `.*.*"),
    ],
)
def test_an_expression_without_an_end_is_refused(peft: dict[str, Any], place: str) -> None:
    start = time.monotonic()
    (problem,) = why_no_end(peft, LETTERS, seconds=0.5)
    assert problem.startswith(place)
    assert problem.endswith("was not matched within 0.5 s; write it without repetitions in repetitions")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "entry", ["(", "a\\", "[z-a]", "*", "(?P<a>x)(?P<a>y)", "x{99999999999999999999}", "(" * 20_000, "(?<=a*)b"]
)
def test_a_broken_expression_is_refused(entry: str) -> None:
    (problem,) = why_no_end({"rank_pattern": {"down_proj": 8, entry: 4}}, NAMES)
    assert problem.startswith("rank_pattern: `")
    assert "` is no regular expression: " in problem
    assert len(problem) < 400


@pytest.mark.parametrize(
    "peft",
    [
        {},
        {"target_modules": None, "rank_pattern": None, "modules_to_save": None, "layers_pattern": None},
        {"target_modules": ["("], "exclude_modules": ["(a|a)*b"]},  # names in a list are no expressions
        {"target_modules": r".*layers\.[02]\..*(qkv|o)_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": r"(?i)MODEL.*", "rank_pattern": {r"^model\.layers\.0\.self_attn\.qkv_proj": 4}},
    ],
)
def test_usual_expressions_pass(peft: dict[str, Any]) -> None:
    assert why_no_end(peft, NAMES) == []


def test_names_need_no_trial() -> None:
    """Converted adapters have a pattern for each layer; a process for them would be time lost."""
    patterns = {r"^model\.layers\.0\.mlp\.up_proj": 4, "down_proj": 8, r"o\-proj$": 2}
    assert why_no_end({"rank_pattern": patterns}, NAMES, seconds=0) == []
