"""The section `evaluation`: what is compared after training, and what is evaluated during training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from phinetune.config.judge import JudgeMetric, is_judge
from phinetune.config.own_metrics import KINDS, CustomMetric, metric_of
from phinetune.config.section import Section, checked_entry
from phinetune.errors import unknown_key
from phinetune.metric_table import METRICS


class EvaluationSection(Section):
    """What of base and tuned model is compared after training, and what is evaluated during training."""

    enabled: bool = Field(True, description="compare base and tuned model on the held-out chats after training")
    generate: bool = Field(True, description="let both models answer the held-out prompts, for `metrics`")
    metrics: list[str | CustomMetric | JudgeMetric] = Field(
        list(METRICS),
        description=f"metrics of answers: {', '.join(METRICS)} (json_… if references hold JSON), "
        f"or your own, {{name: …, KIND: …}}, where KIND is {', '.join(KINDS[:-1])} or {KINDS[-1]}; or a judge, "
        "{name: judge, url: …, model: …} (docs/metrics.md)",
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
    rows_while_training: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="held-out chats that an evaluation during training scores, evenly from all; auto: all of them, or "
        "fewer where nobody said how often and they would take too much time",
    )
    neutral: bool | str | list[str] = Field(
        True,
        description="score base and tuned model on neutral chats too, to see what was forgotten: true (those that "
        "come with phinetune), false, or a file of chats of your own, or a list of them, besides",
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
        if any(one.name == self.win_rate_by for one in self.judges):
            raise ValueError(f"win_rate_by: `{self.win_rate_by}` is a judge, which has a win rate of its own")
        if any(one.name == self.win_rate_by and one.gives_several for one in self.own):
            raise ValueError(
                f"win_rate_by: `{self.win_rate_by}` is counted over all answers and has no number for each"
            )
        return self

    @property
    def own(self) -> list[CustomMetric]:
        """The metrics of the user's own."""
        return [metric for metric in self.metrics if isinstance(metric, CustomMetric)]

    @property
    def judges(self) -> list[JudgeMetric]:
        """The judges that are asked which answer is the better one."""
        return [metric for metric in self.metrics if isinstance(metric, JudgeMetric)]

    def less_is_better(self, keys: Collection[str]) -> list[str]:
        """The keys of own numbers in which less is better."""
        return [key for key in keys if any(one.gives(key) and one.is_less_better(key) for one in self.own)]

    def percents(self, keys: Collection[str]) -> list[str]:
        """The keys of own numbers that are known to be shares of a hundred."""
        return [key for key in keys if any(one.gives(key) and one.is_percent for one in self.own)]


def _metric(entry: Any) -> str | CustomMetric | JudgeMetric:
    if isinstance(entry, (CustomMetric, JudgeMetric)):
        return entry
    if callable(entry):
        entry = metric_of(entry)
    if isinstance(entry, Mapping) and is_judge(entry):
        return checked_entry(JudgeMetric, entry, f"metric `{entry.get('name', 'judge')}`")
    if isinstance(entry, Mapping):
        return checked_entry(CustomMetric, entry, f"metric `{entry.get('name', '?')}`")
    if entry not in METRICS:
        raise ValueError(unknown_key("metrics", str(entry), METRICS).replace("there is no key", "there is no metric"))
    return str(entry)
