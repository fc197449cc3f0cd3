"""The section `evaluation`: what is compared after training, and what is evaluated during training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from phinetune.config.section import Section, checked_entry
from phinetune.errors import unknown_key
from phinetune.metric_table import METRICS, RESERVED


class CustomMetric(Section):
    """A metric of the user's own: a regular expression or a Python function."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="its key in results.json")
    regex: str | None = Field(None, description="a pattern; counts the answers that contain it")
    function: str | None = Field(
        None,
        description="`module:function` or `file.py:function`, called with an answer, its reference and, if it takes "
        "three arguments, the messages before it; gives a number, true, false, or None to leave the row out",
    )
    less_is_better: bool = Field(False, description="whether a smaller number is the better one")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("function")
    @classmethod
    def _two_parts(cls, value: str | None) -> str | None:
        source, colon, name = (value or "a:b").rpartition(":")
        if not (source and colon and name.isidentifier()):
            raise ValueError(f"write it as module:function or file.py:function, not {value}")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> CustomMetric:
        if (self.regex is None) == (self.function is None):
            raise ValueError("give either regex or function")
        if self.name in RESERVED:
            raise ValueError(f"`{self.name}` is the name of another number; choose another")
        return self


class EvaluationSection(Section):
    """What of base and tuned model is compared after training, and what is evaluated during training."""

    enabled: bool = Field(True, description="compare base and tuned model on the held-out chats after training")
    generate: bool = Field(True, description="let both models answer the held-out prompts, for `metrics`")
    metrics: list[str | CustomMetric] = Field(
        list(METRICS),
        description=f"metrics of answers: {', '.join(METRICS)} (json_… if references hold JSON), "
        "{name: …, regex: …}, {name: …, function: file.py:function}",
    )
    win_rate_by: str | None = Field(
        None,
        description="one of `metrics`: how often the tuned model's answer is better by it than the base's",
    )
    max_prompts: int | None = Field(200, ge=1, description="answer the first N held-out prompts at most")
    max_new_tokens: int = Field(256, ge=1, description="tokens an answer may have before it is cut")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="rows scored, and prompts answered, together; auto: as memory allows"
    )
    fixed_prompts: Annotated[int, Field(ge=0)] | list[str] = Field(
        3,
        description="messages answered at every evaluation during training, into samples.jsonl; a number takes the "
        "first held-out prompts",
    )
    metrics_while_training: bool = Field(
        False,
        description="count `metrics` at every evaluation during training; always done if "
        "training_config.metric_for_best_model is one of them",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without a better training_config.metric_for_best_model (loss)",
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="how much better counts as better")

    @field_validator("metrics", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Check each entry by itself. pydantic's own errors would name the types of the union, not the mistake."""
        if not isinstance(value, (list, tuple)):
            return value
        metrics = [_metric(entry) for entry in value]
        names = [metric if isinstance(metric, str) else metric.name for metric in metrics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return metrics

    @model_validator(mode="after")
    def _by_a_metric(self) -> EvaluationSection:
        names = [one if isinstance(one, str) else one.name for one in self.metrics]
        if self.win_rate_by is not None and self.win_rate_by not in names:
            raise ValueError(
                f"win_rate_by: `{self.win_rate_by}` is none of `metrics` ({', '.join(names)}); name it there too"
            )
        return self


def _metric(entry: Any) -> str | CustomMetric:
    if isinstance(entry, CustomMetric):
        return entry
    if isinstance(entry, Mapping):
        return checked_entry(CustomMetric, entry, f"metric `{entry.get('name', '?')}`")
    if entry not in METRICS:
        raise ValueError(unknown_key("metrics", str(entry), METRICS).replace("there is no key", "there is no metric"))
    return str(entry)
