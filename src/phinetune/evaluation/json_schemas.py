"""Whether an answer is JSON that fits a JSON Schema, by the library jsonschema. Nothing is fetched for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from phinetune.errors import ConfigError, RunError
from phinetune.evaluation import json_answers


class FitsSchema:
    """100 if the answer's JSON fits the schema, else 0. The reference is not looked at.

    The JSON is found as for `json_valid`: the whole answer, its first code fence, or its first object or list.

    Args:
        name: the metric's, for errors.
        schema: the schema, or the file that holds it.

    Raises:
        ConfigError: there is no such file, it is no JSON, or it is no schema.
    """

    def __init__(self, name: str, schema: str | Mapping[str, Any]) -> None:
        self.name = name
        self.validator = _validator(f"evaluation.metrics: `{name}`", schema)

    def __call__(self, answer: str, reference: str, messages: Any) -> float:
        found = json_answers.read(answer)
        if found is json_answers.NOTHING:
            return 0.0
        try:
            return 100.0 if self.validator.is_valid(found) else 0.0
        except (Unresolvable, RecursionError) as error:
            raise RunError(
                f"evaluation.metrics: `{self.name}`: the schema refers to something that is not in it, and nothing is "
                f"fetched: {error}"
            ) from error


def _validator(where: str, schema: str | Mapping[str, Any]) -> Validator:
    tree: Any = schema
    if isinstance(schema, str):
        try:
            tree = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{where}: no such file: {schema}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{where}: {schema} can't be read as JSON: {error}") from None
        where = f"{where}: {schema}"
    kind = validator_for(tree)
    try:
        kind.check_schema(tree)
    except SchemaError as error:
        raise ConfigError(f"{where} is no JSON Schema: {error.json_path}: {error.message}") from None
    return kind(tree, registry=Registry())
