"""The bodies of the page's own endpoints: what they take, and what they answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from phinetune.serving.job_request import Parameters

LONGEST = 200_000  # letters of a message
Text = Annotated[str, Field(max_length=LONGEST)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class Place(BaseModel):
    """Where something was found: a line of the file, and what there is to say of it."""

    line: int | None
    detail: str


class Finding(BaseModel):
    """Findings of one kind; `spoils` says whether a run would fail or learn something wrong."""

    kind: str
    what: str
    advice: str
    spoils: bool
    count: int
    places: list[Place]


class Bin(BaseModel):
    """Rows whose length in tokens is from `first` to `last`."""

    first: int
    last: int
    rows: int
    rows_by_trainable_tokens: int


class Check(BaseModel):
    """All that `phinetune data check` says of a file, by a base model's template."""

    file: str
    model: str
    form: str
    rows: int
    kept: int
    cut: int
    dropped: dict[str, int]
    tokens: int
    trainable_tokens: int
    longest: int
    turns: dict[str, int]
    rows_by_tokens: list[Bin]
    languages: dict[str, int]
    sensitive: dict[str, int]
    checkpoint: dict[str, str]
    unused: dict[str, int]
    findings: list[Finding]
    spoiled: bool


class Piece(BaseModel):
    """A token as text."""

    text: str
    special: bool
    trained: bool


class Turn(BaseModel):
    """The tokens of a turn, and a remark such as that something was cut."""

    role: str
    remark: str
    pieces: list[Piece]


class ShownRow(BaseModel):
    """A row as the model will see it; `problem` says why it is dropped."""

    line: int | None
    tokens: int
    trainable_tokens: int
    cut: bool
    unused: list[str]
    problem: str | None
    turns: list[Turn]


class Rows(BaseModel):
    """Some rows of a file, after the `first` ones."""

    file: str
    model: str
    first: int
    total: int
    data: list[ShownRow]


class Setting(BaseModel):
    """A setting that was chosen, with the reason; or one that was given and may surprise."""

    key: str
    value: Any
    why: str
    given: bool


class Planned(BaseModel):
    """What a job will take: bytes, seconds, steps; `lacks` says what this machine will never have for it, and which."""

    fits: bool
    lacks: str | None
    lacks_code: str | None
    memory: int
    free_memory: int
    on_cpu: bool
    seconds: float | None
    steps: int
    rows: int | None
    disk: int
    free_disk: int
    hyperparameters: dict[str, Any]
    learning_rate: float | None
    settings: list[Setting]
    nearest: list[dict[str, Any]]
    notes: list[str]


class SplitAsked(Parameters):
    """How much of a file is kept aside, to measure what was learnt."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Split(BaseModel):
    """The ids of the two new files."""

    training_file: str
    validation_file: str


class Message(Parameters):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Answer(Parameters):
    """A model's answer."""

    model: Name
    content: Annotated[str, Field(min_length=1, max_length=LONGEST)]


class VoteAsked(Parameters):
    """Which of two answers to a conversation someone prefers; with `equal` none."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=200)]
    preferred: Answer
    other: Answer
    equal: bool = False

    @model_validator(mode="after")
    def _an_answer_to_something(self) -> VoteAsked:
        if self.messages[-1].role != "user":
            raise ValueError("the last of the messages is the user's, which both answers answer")
        if not self.equal and self.preferred.content == self.other.content:
            raise ValueError("the answers are the same, so none is preferred; say `equal`")
        return self


class Vote(BaseModel):
    """A vote as it is kept."""

    object: Literal["vote"] = "vote"
    id: str
    created_at: int
    messages: list[Message]
    preferred: Answer
    other: Answer
    equal: bool


class Page(BaseModel):
    """A piece of a list; the next one begins after `last_id`."""

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class Votes(Page):
    """Votes, newest first."""

    data: list[Vote]


class VoteFile(BaseModel):
    """The file that votes became: rows to train on by `dpo`. `equal` votes prefer nothing and are left out."""

    file: str
    rows: int
    equal: int


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str
    deleted: bool = True


Target = Literal["merge", "gguf", "gguf-lora", "ollama", "onnx", "push"]


class ExportAsked(Parameters):
    """What a tuned model is to be written as; or, for `push`, the repository on the hub that it goes to."""

    model: Name
    target: Target
    type: Annotated[str, Field(max_length=16)] | None = Field(None, description="of the numbers: gguf, ollama, onnx")
    repo: Annotated[str, Field(max_length=200)] | None = Field(None, description="for push: NAME or OWNER/NAME")
    private: bool = Field(True, description="for push: whether only you may see the repository")
    merged: bool = Field(False, description="for push: base and adapter as one model")


class Written(BaseModel):
    """What an export wrote: its name, its bytes, how to run it, and what to know about it."""

    name: str
    what: str
    size: int
    commands: list[str]
    notes: list[str]
    url: str | None = None


class Export(BaseModel):
    """An export: `queued`, `running`, `succeeded` or `failed`."""

    object: Literal["export"] = "export"
    id: str
    created_at: int
    finished_at: int | None
    status: str
    model: str
    target: str
    type: str | None
    repo: str | None
    written: Written | None
    error: str | None


class Exports(Page):
    """Exports, newest first."""

    data: list[Export]
