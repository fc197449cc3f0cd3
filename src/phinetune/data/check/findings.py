"""The kinds of findings of `phinetune data check`, and the places where they were found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from phinetune.terminal_text import printable

KEPT = 100_000  # places kept for each kind; further ones are only counted


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        title: what was found, in the plural.
        advice: what to do about it.
        spoils: whether a run would fail because of it, or would learn or measure something wrong.
        left_out: whether `--fix` leaves such rows out.
    """

    title: str
    advice: str
    spoils: bool = False
    left_out: bool = False


KINDS: dict[str, Kind] = {
    "broken": Kind("places without a readable row", "repair or delete them", True, True),
    "encoding": Kind("text that is not UTF-8", "save the file as UTF-8; --fix does so where it can", True),
    "nothing": Kind("files with nothing to train on", "put rows in them, or do not name them", True),
    "form": Kind(
        "rows of no known form",
        "say which column is what (`phinetune data columns FILE` proposes it), or see `Chats` in docs/data.md",
        True,
        True,
    ),
    "roles": Kind("chats with unknown roles, no answer, or a turn out of place", "correct the turns", True, True),
    "content": Kind("turns whose content is missing or no text", "write the content as text", True, True),
    "response": Kind("texts without an answer by its tag", "see data.response, or correct the texts", True, True),
    "tools": Kind("tools or tool calls that can't be read", "see `Chats` in docs/data.md for their form", True, True),
    "system": Kind("system messages that this checkpoint's template drops", "set data.system to fold or drop", True),
    "template": Kind("chats that this checkpoint's template can't render", "take another checkpoint or form", True),
    "labels": Kind("ready-made ids or labels that can't be right", "make them again, with this tokenizer", True, True),
    "untrained": Kind("rows without a token to train on", "see data.loss_on and `train: false`", True, True),
    "letters": Kind("halves of characters (single surrogates)", "write the file again from its source", True, True),
    "huge": Kind("rows far too long to be chats", "split them, or look whether line ends are missing", True, True),
    "no_stop": Kind("sets that never end a turn", "see data.loss_on and training_config.max_length", True),
    "empty_answer": Kind("answers without words", "the model would learn to say nothing", True, True),
    "prompts": Kind("pairs whose answers belong to unlike prompts", "give both answers the same prompt", True, True),
    "equal_answers": Kind("pairs of equal answers", "they are left out, as neither is preferred", False, True),
    "answer_markup": Kind(
        "answers that hold a template's tokens",
        "these rows are rendered already: give them as `text`, or remove the tokens",
        True,
        True,
    ),
    "rendered": Kind(
        "questions that begin and end with this template's tokens",
        "training writes a second template around them: give them as `text`, or remove the tokens",
        True,
        True,
    ),
    "mojibake": Kind("garbled letters (Ã© for é)", "read the source as UTF-8; --fix repairs them", True),
    "replaced": Kind("lost letters (replacement characters)", "write the file again from its source", True, True),
    "secret": Kind("keys and passwords", "a model repeats what it has learned; remove and revoke them", True, True),
    "shared": Kind("rows that stand in training and held-out chats", "keep each row in one of the two", True, True),
    "too_long": Kind("rows dropped as too long", "raise training_config.max_length, or split them"),
    "cut": Kind("rows cut to fit", "raise training_config.max_length to keep them whole"),
    "empty_turn": Kind("questions or system messages without words", "fill or delete them"),
    "repeated_turn": Kind("turns that repeat one before", "look whether the chat was assembled wrongly"),
    "order": Kind("turns in an unusual order", "users and assistants should take turns; tools answer calls"),
    "calls": Kind("tool calls that don't fit their tools or answers", "look whether a turn or a tool is missing"),
    "control": Kind("control or invisible characters", "--fix removes them"),
    "typed_token": Kind("template tokens typed in a message", "training takes them as letters, never as tokens"),
    "foreign_markup": Kind("another template's tokens", "look whether the rows are rendered already"),
    "personal": Kind("personal data", "make sure that you are allowed to train on it"),
    "duplicate": Kind("rows that occur twice", "--fix keeps the first one", False, True),
    "contradiction": Kind(
        "preferences that say the opposite of an earlier row", "the two teach nothing; keep the one that is right"
    ),
    "near": Kind("rows nearly equal to earlier ones (8 of 10 word triples shared)", "look whether they add anything"),
    "near_shared": Kind("training rows nearly equal to a held-out row", "the tuned model may seem better than it is"),
    "length_bias": Kind(
        "sets whose chosen answers differ in length",
        "the model may learn the length and not what you prefer; pair answers of like length, or take a loss by the "
        "mean token (dpo: sigmoid_norm; simpo)",
    ),
    "language": Kind("answers in another language than their question", "look whether that is intended"),
}


class Place(NamedTuple):
    """Where something was found, and details of it."""

    where: str
    detail: str


@dataclass
class Found:
    """The findings of one kind.

    Attributes:
        spoils: whether they spoil a run. The first one decides.
        count: how many were found; `places` holds the first of them.
    """

    kind: str
    spoils: bool
    count: int = 0
    places: list[Place] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        about = KINDS[self.kind]
        return {
            "kind": self.kind,
            "what": about.title,
            "advice": about.advice,
            "spoils": self.spoils,
            "count": self.count,
            "places": [place._asdict() for place in self.places],
        }


@dataclass
class Findings:
    """All findings, by kind."""

    by_kind: dict[str, Found] = field(default_factory=dict)

    def add(self, kind: str, where: str, detail: str = "", *, spoils: bool | None = None) -> None:
        """Add one finding.

        Args:
            spoils: whether it spoils a run, if that differs from what is usual for its kind.
        """
        spoiling = KINDS[kind].spoils if spoils is None else spoils
        found = self.by_kind.setdefault(kind, Found(kind, spoiling))
        found.count += 1
        if len(found.places) < KEPT:
            found.places.append(Place(printable(where), printable(detail)))

    @property
    def spoil(self) -> bool:
        """Whether at least one finding spoils a run."""
        return any(found.spoils for found in self.by_kind.values())

    def in_order(self) -> list[Found]:
        """The findings in the order of `KINDS`, but those that spoil a run first."""
        order = list(KINDS)
        return sorted(self.by_kind.values(), key=lambda found: (not found.spoils, order.index(found.kind)))
