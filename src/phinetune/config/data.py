"""The section `data`: which chats, and how they become tokens and labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from phinetune.config.format_fields import parse_template
from phinetune.config.row_forms import ALL_FORMS, FORM_NAMES, PREFERENCE_NAMES
from phinetune.config.section import Section, checked_entry, one_of
from phinetune.errors import unknown_key

TREATED = ("keep", "fold", "drop")  # what `data.system` does with system messages
OF_A_CHAT = ("user", "assistant", "system", "tag")  # what `data.columns` names besides the keys of the forms
COLUMN_KEYS = (*OF_A_CHAT, *sorted({key for form in ALL_FORMS for key in form.read} - set(OF_A_CHAT)))


class WeightedFile(Section):
    """One of several training files, and how often its rows are taken."""

    path: str = Field(description="file, datasets folder or hub id")
    weight: float = Field(1.0, gt=0, le=100, description="2 takes every row twice, 0.5 a drawn half of them")

    @field_validator("path", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value


class OtherSplit(Section):
    """Held-out or test chats that are a split of a data set, by default of the one that is trained on."""

    path: str | None = Field(None, description="datasets folder or hub id; data.train if left out")
    split: str | None = Field(None, description="its split; data.split if left out")
    name: str | None = Field(None, description="its configuration; data.name if left out")

    @field_validator("path", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _names_something(self) -> OtherSplit:
        if self.path is None and self.split is None and self.name is None:
            raise ValueError("name a `split`, a `path` or the `name` of a configuration")
        return self


class DataSection(Section):
    """Which chats, and how they become tokens and labels."""

    train: str | list[str | WeightedFile] | None = Field(
        None,
        description="file (.jsonl .json .csv .tsv .parquet .xlsx .txt .md; text also as .gz or .zst), pattern such as "
        "chats/*.jsonl, datasets folder or hub id; or a list of them, where {path: …, weight: 2} takes a file's rows "
        "twice and weight 0.5 half of them; in Python also a Dataset, a data frame, a list or an iterator of dicts",
    )
    eval: float | str | list[str] | OtherSplit | None = Field(
        None,
        description="held-out chats: a file like `train`; the fraction of `train` to hold out; or {split: validation} "
        "for another split of `train` ({path: …, split: …, name: …} for one of another data set)",
    )
    test: str | list[str] | OtherSplit | None = Field(
        None,
        description="chats for the final verdict, looked at once, after training: a file, or {split: test}; "
        "`eval` then guides the training alone",
    )
    split: str = Field("train", description="split to read of a datasets folder or hub id")
    name: str | None = Field(
        None, description="configuration to read of a datasets folder or hub id; of an .xlsx file, the sheet"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="which column is what: {user: question, assistant: answer, system: context, tag: topic}, or a key "
        "of a form as {messages: dialog}; a.b is the key b inside the column a; `phinetune data columns FILE` proposes",
    )
    prompt: str | None = Field(
        None, description='the question as a template of columns, such as "Translate to {lang}: {text}"'
    )
    completion: str | None = Field(None, description='the answer as a template of columns, such as "{target}"')
    system_text: str | None = Field(
        None,
        description="system message of every row that has none of its own; may hold {column}s; a `system` of several "
        "words means this",
    )
    row: str | None = Field(
        None,
        description="in Python only: a function that is given a row as a dict and returns a dict of a known form, a "
        "list of messages, a text, or None to leave the row out",
    )
    text_by: Literal["paragraph", "tokens"] = Field(
        "paragraph",
        description="what is a row of a .txt or .md file: a paragraph; or as much as fits, cut at "
        "training_config.max_length tokens",
    )
    response: str | None = Field(
        None,
        description='of rows of text, what stands before an answer, such as "### Response:"; then answers are trained '
        "on alone (loss_on: all trains on all of it), and evaluated",
    )
    instruction: str | None = Field(
        None,
        description='of rows of text with several answers, what stands before a question, such as "### Instruction:"; '
        "without it a text has one answer, behind its last `response`",
    )
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
        "never), or drop the chat; a text: cut it into pieces (with `response`: its beginning off), or drop it",
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
    train_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="train on so large a share of the rows of `train`, drawn by `seed`; a smaller share is a part of a "
        "larger one, what `group` joins stays together, and held-out rows are the same for every share",
    )
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
    replay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="answers of the base itself to neutral prompts that are mixed in, for each row of `train`, so that "
        "less is forgotten: 0.1 mixes in one for ten rows",
    )
    tag: str | None = Field(
        None, description="column of the rows; evaluations are also split by its values (a task, a language, …)"
    )
    group: str | None = Field(
        None,
        description="column of the rows (a customer, a document); rows with the same value stay on one side of a split "
        "by fraction",
    )
    seed: int = Field(0, description="seed of the split by fraction and of the rows drawn by weight")

    @model_validator(mode="before")
    @classmethod
    def _text_for_all_rows(cls, value: Any) -> Any:
        """Take a `system` of several words for `system_text`, and `columns.tag` for `tag`."""
        if not isinstance(value, Mapping):
            return value
        tree, text = dict(value), value.get("system")
        if isinstance(text, str) and text not in TREATED and len(text.split()) > 1:
            if tree.get("system_text") is not None:
                raise ValueError("`system` and `system_text` both hold a text; keep one of them")
            tree["system_text"] = tree.pop("system")
        columns = tree.get("columns")
        if isinstance(columns, Mapping) and "tag" in columns:
            if tree.get("tag") not in (None, columns["tag"]):
                raise ValueError(f"`tag` names {tree['tag']} and `columns` {columns['tag']}; keep one of them")
            tree["tag"] = columns["tag"]
            tree["columns"] = {key: column for key, column in columns.items() if key != "tag"}
        return tree

    @field_validator("system", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in TREATED:
            raise ValueError(
                f"Input should be 'keep', 'fold' or 'drop', not {value!r}; a system message of one word is written as "
                "`system_text`"
            )
        return value

    @field_validator("columns")
    @classmethod
    def _known_keys(cls, value: dict[str, str]) -> dict[str, str]:
        known = ", ".join((*OF_A_CHAT, "messages", "prompt", "completion", "text"))
        problems = [f"{unknown_key('columns', key, COLUMN_KEYS)} (keys are {known}, …)" for key in value]
        problems = [problem for problem, key in zip(problems, value, strict=True) if key not in COLUMN_KEYS]
        if problems:
            raise ValueError("; ".join(problems))
        return value

    @field_validator("prompt", "completion", "system_text")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        parse_template(value or "")
        return value

    @model_validator(mode="after")
    def _said_once(self) -> DataSection:
        """Refuse two ways to say what a question, an answer or a system message is."""
        problems = [
            f"`{knob}` and `columns.{key}` both say what the {what} is; keep one of them"
            for knob, key, what in (
                ("prompt", "user", "question"),
                ("prompt", "prompt", "question"),
                ("completion", "assistant", "answer"),
                ("completion", "completion", "answer"),
            )
            if getattr(self, knob) is not None and key in self.columns
        ]
        problems += [
            f"`columns` names both {ours} and {theirs}, which are one thing; keep one of them"
            for ours, theirs in (("user", "prompt"), ("assistant", "completion"))
            if ours in self.columns and theirs in self.columns
        ]
        if self.response is not None and not self.response.strip():
            problems.append("`response` is empty; write what stands before an answer, or leave it out")
        if self.instruction is not None and (self.response is None or not self.instruction.strip()):
            problems.append("`instruction` says where a question begins; it needs a text, and `response` beside it")
        if self.instruction is not None and self.instruction == self.response:
            problems.append("`instruction` and `response` are the same text, so answers would end where they begin")
        if self.row and (self.columns or self.prompt is not None or self.completion is not None):
            problems.append("`row` makes the whole row, so leave `columns`, `prompt` and `completion` out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @field_validator("train", mode="before")
    @classmethod
    def _weighted_files(cls, value: Any) -> Any:
        """Check each entry by itself. pydantic's own errors would name the types of the union, not the mistake."""
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return _text(value, "name a file, a datasets folder or a hub id, or a list of them")
        return [_training_file(entry, f"entry {i}") for i, entry in enumerate(value, 1)]

    @field_validator("eval", "test", mode="before")
    @classmethod
    def _other_split(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping):
            return checked_entry(OtherSplit, value, str(info.field_name))
        if isinstance(value, (list, tuple)):
            lone = "a list names files or folders; a fraction or a split stands alone, without a list"
            return [_text(entry, lone, f"entry {i}") for i, entry in enumerate(value, 1)]
        if info.field_name == "test":
            return value if isinstance(value, OtherSplit) else _text(value, "name a file, or write {split: test}")
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
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
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
