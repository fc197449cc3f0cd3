"""Answers against a JSON Schema, in the configuration or in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ConfigError, RunError
from phinetune.evaluation.metrics import open_metrics

SCHEMA = {"type": "object", "required": ["order"], "properties": {"order": {"type": "integer", "minimum": 1}}}


def opened(schema: Any) -> Any:
    (metric,) = open_metrics(EvaluationSection(metrics=[{"name": "fits", "json_schema": schema}])).values()
    return metric


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"order": 7}', 100),
        ('Sure!\n```json\n{"order": 7, "more": []}\n```', 100),
        ('{"order": "7"}', 0),
        ('{"order": 0}', 0),
        ('{"more": 1}', 0),
        ("[]", 0),
        ("no JSON", 0),
        ('{"order": 7', 0),
    ],
)
def test_an_answer_fits_or_not(answer: str, right: float, tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    file.write_text(json.dumps(SCHEMA))
    assert opened(SCHEMA)(answer, "", []) == opened(str(file))(answer, "", []) == right


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ("missing.json", "no such file: missing.json"),
        ({"type": "objekt"}, r"is no JSON Schema: \$\.type: 'objekt' is not valid"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(schema: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        opened(schema)


def test_nothing_is_fetched_for_a_schema() -> None:
    with pytest.raises(RunError, match="`fits`: the schema refers to something that is not in it"):
        opened({"$ref": "http://127.0.0.1:9/order.json"})('{"order": 7}', "", [])
