"""The section `data`: which chats, and how they become tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from phinetune.config.row_forms import FORM_NAMES, PREFERENCE_NAMES
from phinetune.config.section import Section, checked_entry, one_of


class WeightedFile(Section):
    """One of several training files, and how often its rows are taken."""

    path: str = Field(description="file, datasets folder or hub id")
    weight: float = Field(1.0, gt=0, le=100, description="2 takes every row twice, 0.5 a drawn half of them")


class OtherSplit(Section):
    """Held-out chats that are a split of a data set, by default of the one that is trained on."""

    path: str | None = Field(None, description="datasets folder or hub id; data.train if left out")
    split: str | None = Field(None, description="its split; data.split if left out")
    name: str | None = Field(None, description="its configuration; data.name if left out")

    @model_validator(mode="after")
    def _names_something(self) -> OtherSplit:
        if self.path is None and self.split is None and self.name is None:
            raise ValueError("name a `split`, a `path` or the `name` of a configuration")
        return self


class DataSection(Section):
    """Which chats, and how they become tokens and labels."""

    train: str | list[str | WeightedFile] | None = Field(
        None,
        description="file (.jsonl .json .csv .parquet), datasets folder or hub id; or a list of them, where "
        "{path: …, weight: 2} takes a file's rows twice and weight 0.5 half of them",
    )
    eval: float | str | list[str] | OtherSplit | None = Field(
        None,
        description="held-out chats: a file like `train`; the fraction of `train` to hold out; or {split: validation} "
        "for another split of `train` ({path: …, split: …, name: …} for one of another data set)",
    )
    split: str = Field("train", description="split to read of a datasets folder or hub id")
    name: str | None = Field(None, description="configuration to read of a datasets folder or hub id")
    format: Annotated[str, one_of("auto", *FORM_NAMES, *PREFERENCE_NAMES)] = Field(
        "auto",
        description=f"form of the rows: {', '.join(FORM_NAMES)}; auto looks at each row's keys. text and tokens "
        f"(input_ids, labels) are taken as they stand. With preferences: {', '.join(PREFERENCE_NAMES)}",
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="tokens trained on: every assistant turn, the last one, or all tokens"
    )
    system: Literal["keep", "fold", "drop"] = Field(
        "keep",
        description="system messages: keep (refused where the template drops them), "
        "fold into the first user turn, or drop",
    )
    overlong: Literal["cut", "drop"] = Field(
        "cut",
        description="a chat over training_config.max_length: cut its prompt (oldest turns first, answers "
        "never), or drop the chat; a text: cut it into pieces, or drop it",
    )
    overlap: int = Field(
        1,
        ge=1,
        description="tokens that the next piece of a long text repeats as context, without loss on them",
    )
    invalid_rows: Literal["fail", "drop"] = Field(
        "fail", description="rows that can't be used: stop and list them, or drop and count them"
    )
    limit: int | None = Field(None, ge=1, description="use the first N rows only")
    streaming: bool = Field(
        False,
        description="read and encode rows while training, for sets that the disk has no room for; needs "
        "training_config.max_steps, and held-out chats from a file",
    )
    packing: Literal["conversations", "tokens"] = Field(
        "conversations",
        description="what per_device_train_batch_size counts: conversations, or rows filled up to "
        "training_config.max_length tokens with as many conversations as fit",
    )
    tag: str | None = Field(
        None, description="column of the rows; evaluations are also split by its values (a task, a language, …)"
    )
    seed: int = Field(0, description="seed of the split by fraction and of the rows drawn by weight")

    @field_validator("train", mode="before")
    @classmethod
    def _weighted_files(cls, value: Any) -> Any:
        """Check each entry by itself. pydantic's own errors would name the types of the union, not the mistake."""
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return _text(value, "name a file, a datasets folder or a hub id, or a list of them")
        return [_training_file(entry, f"entry {i}") for i, entry in enumerate(value, 1)]

    @field_validator("eval", mode="before")
    @classmethod
    def _other_split(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return checked_entry(OtherSplit, value, "eval")
        if isinstance(value, (list, tuple)):
            lone = "a list names files or folders; a fraction or a split stands alone, without a list"
            return [_text(entry, lone, f"entry {i}") for i, entry in enumerate(value, 1)]
        return value if isinstance(value, (int, float, OtherSplit)) else _fraction_of(_text(value, "name a file"))

    @field_validator("eval")
    @classmethod
    def _fraction(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"the fraction held out must lie between 0 and 1, not {value}")
        return value


def _training_file(entry: Any, where: str) -> Any:
    if isinstance(entry, Mapping):
        return checked_entry(WeightedFile, entry, where)
    if isinstance(entry, WeightedFile):
        return entry
    return _text(entry, "name a file, a datasets folder or a hub id, or write {path: …, weight: 2}", where)


def _text(value: Any, wanted: str, where: str = "") -> str | None:
    """A value that must be a text, or nothing where it is no entry of a list.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) or (value is None and not where):
        return value
    raise ValueError(f"{where + ': ' if where else ''}{value!r} is no text; {wanted}")


def _fraction_of(value: str | None) -> float | str | None:
    """A text that is a number between 0 and 1 as this number: YAML reads `1e-1` as a text."""
    try:
        number = float(value or "")
    except ValueError:
        return value
    return number if 0 < number < 1 else value
