"""Metrics of the user's own, as `evaluation.metrics` names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_serializer, field_validator, model_validator

from phinetune.config.section import Section
from phinetune.metric_table import RESERVED

# What an own metric is counted by. Each has exactly one of them.
KINDS = ("regex", "function", "compute", "sql", "json_schema", "classes", "similarity")
CALLS = ("function", "compute")  # those that run code of the user's
FILES = ("sql", "json_schema", "similarity")  # those that may name a file or a folder
FROM_PROMPT = "prompt"  # the value of `sql` that takes the tables from the chat itself
ACCURACY, MACRO_F1 = "accuracy", "macro_f1"  # what `classes` gives, behind the metric's name
UNBOUND = "__main__"  # the module of a function that a script or a notebook defines


@dataclass(frozen=True)
class GivenFunction:
    """A function that was given in Python. Copies of a configuration share it."""

    function: Callable[..., Any]

    def __deepcopy__(self, _: Any) -> GivenFunction:
        return self

    @property
    def place(self) -> str:
        """`module:function`, for a configuration that is written down."""
        name = str(getattr(self.function, "__qualname__", type(self.function).__qualname__))
        return f"{getattr(self.function, '__module__', UNBOUND)}:{name}"


class CustomMetric(Section):
    """A metric of the user's own: how it is counted, and which way is better."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="its key in results.json")
    regex: str | None = Field(None, description="a pattern; counts the answers that contain it")
    function: str | GivenFunction | None = Field(
        None,
        description="`module:function` or `file.py:function`, called with an answer, its reference and, if it takes "
        "three arguments, the messages before it; gives a number, true, false, or None to leave the row out",
    )
    compute: str | GivenFunction | None = Field(
        None,
        description="`module:function` or `file.py:function`, called once with all answers, all references and, if it "
        "takes three arguments, all messages; gives a number, or a dictionary of numbers",
    )
    resamples: int | Literal["auto"] = Field(
        "auto",
        description="calls of `compute` for each interval, for each model: auto is 1,000, or fewer if they would take "
        "more than half a minute; 0 is no interval",
    )
    sql: str | None = Field(
        None,
        description="counts the answers whose SQL gives the reference's result in SQLite: a file of CREATE TABLE and "
        "INSERT statements, or `prompt` for those in the messages of each chat",
    )
    json_schema: str | dict[str, Any] | None = Field(
        None, description="counts the answers that are JSON and fit this JSON Schema: a file, or the schema itself"
    )
    classes: Literal["auto"] | list[str] | None = Field(
        None,
        description="the labels that answers are sorted into, for accuracy, macro-F1 and a confusion matrix; auto "
        "takes those of the references",
    )
    similarity: str | None = Field(
        None, description="a sentence encoder, a folder or a hub id: the cosine of answer and reference, in percent"
    )
    less_is_better: bool | list[str] = Field(
        False, description="whether a smaller number is the better one; of `compute`, the names of such numbers"
    )

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator(*CALLS, mode="before")
    @classmethod
    def _two_parts(cls, value: Any) -> Any:
        if callable(value):
            return GivenFunction(value)
        if not isinstance(value, str | None):
            return value
        source, colon, name = (value or "a:b").rpartition(":")
        if not (source and colon and name.isidentifier()):
            raise ValueError(f"write it as module:function or file.py:function, not {value}")
        return value

    @field_validator("resamples")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if value != "auto" and not (value == 0 or 20 <= value <= 10_000):
            raise ValueError(f"it is auto, 0, or a number from 20 to 10,000, not {value}")
        return value

    @field_validator("classes")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, list):
            plain = [label.strip().casefold() for label in value]
            if len(plain) < 2 or len(set(plain)) < len(plain) or not all(plain):
                raise ValueError("name two labels or more, none of them empty or twice (case does not count)")
        return value

    @field_serializer(*CALLS)
    def _named(self, value: Any) -> str | None:
        return value.place if isinstance(value, GivenFunction) else value

    @model_validator(mode="after")
    def _one_kind(self) -> CustomMetric:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}" + (f", not {' and '.join(given)}" if given else ""))
        if self.name in RESERVED:
            raise ValueError(f"`{self.name}` is the name of another number; choose another")
        near = next((key for key in sorted(RESERVED) if key.startswith(f"{self.name}_")), None)
        if near and self.gives_several:
            raise ValueError(
                f"its numbers are called {self.name}_…, and `{near}` is another number; choose another name"
            )
        if self.resamples != "auto" and self.compute is None:
            raise ValueError("`resamples` is for `compute`")
        if isinstance(self.less_is_better, list) and self.compute is None:
            raise ValueError("`less_is_better` is true or false here; a list names numbers of `compute`")
        return self

    @property
    def kind(self) -> str:
        """The one of `KINDS` that it is counted by."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def gives_several(self) -> bool:
        """Whether it may give several numbers, called by its name and one of their own."""
        return self.kind in ("compute", "classes")

    @property
    def is_percent(self) -> bool:
        """Whether its numbers are known to be shares of a hundred."""
        return self.kind not in CALLS

    @property
    def keys(self) -> list[str]:
        """The keys of its numbers in results.json. `compute` may return others, which begin with its name and _."""
        return [f"{self.name}_{ACCURACY}", f"{self.name}_{MACRO_F1}"] if self.kind == "classes" else [self.name]

    def gives(self, key: str) -> bool:
        """Whether a number of this key may be its own. What `compute` returns is not known before."""
        return key in self.keys or (self.kind == "compute" and key.startswith(f"{self.name}_"))

    def is_less_better(self, key: str) -> bool:
        """Whether less is better in its number of this key."""
        if isinstance(self.less_is_better, bool):
            return self.less_is_better
        return key.removeprefix(f"{self.name}_") in self.less_is_better

    @property
    def called(self) -> str | GivenFunction | None:
        """The function that it calls; None if it calls none."""
        return next((getattr(self, kind) for kind in CALLS if getattr(self, kind) is not None), None)


def name_places(metric: CustomMetric, renamed: Callable[[str], str]) -> None:
    """Give each file or folder that a metric names another name."""
    for kind in FILES:
        place = getattr(metric, kind)
        if isinstance(place, str) and place != FROM_PROMPT:
            setattr(metric, kind, renamed(place))
    for kind in CALLS:
        file, colon, function = str(getattr(metric, kind)).rpartition(":")
        if isinstance(getattr(metric, kind), str) and file.endswith(".py"):  # anything else is a module
            setattr(metric, kind, renamed(file) + colon + function)


def metric_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The entry for a function that stands in `evaluation.metrics` by itself.

    Raises:
        ValueError: it has no name that could be a metric's.
    """
    name = str(getattr(function, "__name__", ""))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{function!r} has no name; write {{name: …, function: …}}")
    return {"name": name, "function": function}
