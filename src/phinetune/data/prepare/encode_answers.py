"""Reads and encodes rows of preferences: a pair becomes one example of two conversations that begin alike.

Only the answers have labels. What is too long is cut in the prompt, for both answers alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import TemplateError

from phinetune.chats.template import Message
from phinetune.config.row_forms import JUDGED_FORMS, PAIR_FORMS
from phinetune.data.prepare.encode_rows import BATCH, NOTHING_TRAINED, RowEncoder, RowOutcome, audit_outcome
from phinetune.data.read.preferences import Preference, read_preference
from phinetune.data.read.row import Row
from phinetune.data.read.row_mapping import LeftOut, MappedRow, RowMapping
from phinetune.engine.examples import Encoded
from phinetune.errors import ConfigError, RowError

EQUAL = "both answers are equal, so neither is preferred"


@dataclass(frozen=True)
class PairRows(RowEncoder):
    """Turns rows with two answers into examples: the chosen conversation, then the rejected one."""

    joins: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = tuple(form.name for form in PAIR_FORMS)
    judged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [f"data.{key}: it is for rows of text, and a preference has none" for key in self._of_texts()]
        if self.section.loss_on == "all":
            problems.append("data.loss_on: all: a preference is learnt from the answers alone; take assistant, or last")
        if not self.judged:
            problems += [
                f"{knob}: a pair has two answers; name the columns `chosen` and `rejected`"
                for knob in self._one_answer()
            ]
        if problems:
            raise ConfigError(problems)

    def _of_texts(self) -> list[str]:
        """The keys that a section has for rows of text."""
        return [key for key in ("response", "instruction") if getattr(self.section, key) is not None]

    def _one_answer(self) -> list[str]:
        """What a section says of the only answer of a row."""
        return [
            *(["data.columns: assistant"] if "assistant" in self.section.columns else []),
            *(["data.completion"] if self.section.completion is not None else []),
        ]

    def __call__(self, rows: Iterable[Row]) -> Iterator[RowOutcome]:
        waiting, mapping = iter(rows), RowMapping.of(self.section)
        while batch := list(itertools.islice(waiting, BATCH)):
            outcomes = [outcome for row in batch for outcome in self._read(row, mapping)]
            self._encode(outcomes)
            for outcome in outcomes:
                self._finish(outcome)
            yield from self._compared(outcomes)

    def _read(self, row: Row, mapping: RowMapping | None) -> list[RowOutcome]:
        """The outcomes of a row, not encoded yet."""
        outcome = RowOutcome(row)
        try:
            made = mapping(row.fields) if mapping else MappedRow(row.fields)
            return self._examples(outcome, self._found(made, outcome))
        except LeftOut as error:
            outcome.reason = str(error)
        except RowError as error:
            if error.kind == "equal_answers":  # nothing is wrong with the row
                outcome.reason = str(error)
            else:
                outcome.refuse(error)
        return [outcome]

    def _found(self, made: MappedRow, outcome: RowOutcome) -> Preference:
        """What a row says; its outcome gets the form and the chats."""
        outcome.form, found = read_preference(made.fields, self.section.format, judged=self.judged)
        found = found._replace(prompt=made.with_system(found.prompt))
        chats = found.chats()
        outcome.messages, outcome.chat = chats[0], self.encoder.prepare(chats[0])
        if len(chats) > 1:
            outcome.other, outcome.rejected = self.encoder.prepare(chats[1]), found.answers[1].messages
        outcome.answer_turns = tuple(len(answer.messages) for answer in found.answers)
        outcome.liked = found.answers[0].liked
        audit_outcome(outcome, made, self.section, self.encoder, self.taken)
        return found

    def _examples(self, outcome: RowOutcome, found: Preference) -> list[RowOutcome]:
        """One example a row."""
        return [outcome]

    def _compared(self, outcomes: list[RowOutcome]) -> list[RowOutcome]:
        """The outcomes, less what the answers of a row say of each other."""
        return outcomes

    def _encode(self, outcomes: Sequence[RowOutcome]) -> None:
        """Encode the chats of all rows in one call; where the template refuses some, row by row."""
        kept = [outcome for outcome in outcomes if outcome.chat]
        try:
            encoded = iter(self.encoder.encode([chat for outcome in kept for chat in _chats(outcome)]))
            for outcome in kept:
                outcome.encoded = self._joined([next(encoded) for _ in _chats(outcome)], outcome)
        except (RowError, TemplateError, TypeError, ValueError):
            for outcome in kept:
                self._encode_alone(outcome)

    def _encode_alone(self, outcome: RowOutcome) -> None:
        try:
            outcome.encoded = self._joined(self.encoder.encode(_chats(outcome)), outcome)
        except RowError as error:
            outcome.refuse(error)
        except (TemplateError, TypeError, ValueError) as error:
            outcome.refuse(RowError(f"the chat template refuses it: {error}", "template"))

    def _joined(self, parts: Sequence[Encoded], outcome: RowOutcome) -> Encoded:
        """The conversations of an example, one after the other."""
        return Encoded(
            [token for part in parts for token in part.input_ids],
            [label for part in parts for label in part.labels],
            tuple(len(part.input_ids) for part in parts),
        )

    def _finish(self, outcome: RowOutcome) -> None:
        """Cut or drop what is too long; drop what teaches nothing."""
        if outcome.encoded and self.max_length and max(outcome.encoded.lengths) > self.max_length:
            self._fit(outcome, self.max_length)
        encoded = outcome.encoded
        if encoded is None:
            return
        if any(not part.trainable for part in parts_of(encoded)):
            outcome.refuse(RowError(NOTHING_TRAINED, "untrained"))
        elif len(encoded.lengths) == 2 and len({tuple(part.input_ids) for part in parts_of(encoded)}) == 1:
            outcome.encoded, outcome.reason = None, EQUAL

    def _fit(self, outcome: RowOutcome, max_length: int) -> None:
        """Cut the prompt so that the longer conversation fits, and give the other one the same prompt."""
        fitted = self._fitted(outcome, max_length) if self.section.overlong == "cut" else None
        if fitted is None:
            outcome.encoded, outcome.reason = None, f"longer than {max_length} tokens"
            return
        outcome.fitted, outcome.cut = fitted[0], True
        outcome.other_fitted = fitted[1] if len(fitted) > 1 else []
        outcome.encoded = self._joined(self.encoder.encode(fitted), outcome)
        if max(outcome.encoded.lengths) > max_length:
            outcome.encoded, outcome.reason = None, f"longer than {max_length} tokens"

    def _fitted(self, outcome: RowOutcome, max_length: int) -> list[list[Message]] | None:
        assert outcome.encoded
        chats, lengths = _chats(outcome), outcome.encoded.lengths
        longest = lengths.index(max(lengths))
        answers = [chat[len(chat) - turns :] for chat, turns in zip(chats, outcome.answer_turns, strict=True)]
        made = self.encoder.fit(chats[longest], max_length)
        if made is None:
            return None
        prompt = made[0][: len(made[0]) - len(answers[longest])]
        whole = prompt and made[0][len(prompt) :] == answers[longest]  # an answer may hold questions too
        return [[*prompt, *answer] for answer in answers] if whole else None


@dataclass(frozen=True)
class WholePairRows(PairRows):
    """Pairs whose chosen conversation has labels in its prompt too; how many stands in `prompt_labels`."""

    columns: ClassVar[tuple[str, ...]] = ("prompt_labels",)

    def _joined(self, parts: Sequence[Encoded], outcome: RowOutcome) -> Encoded:
        chosen, *others = parts
        added = len(chosen.input_ids) - 1 - Encoded(chosen.input_ids[1:], chosen.labels[1:]).trainable
        whole = Encoded(chosen.input_ids, list(chosen.input_ids))
        # A label between the answer's own (a tool's result, say) would be taken for one of the prompt.
        first = next((i for i, label in enumerate(chosen.labels) if label >= 0), len(chosen.labels))
        if first - 1 != added:
            raise RowError("the answers have turns that are no assistant's, which this objective can't take", "roles")
        return super()._joined([whole, *others], outcome)._replace(values={"prompt_labels": float(added)})


@dataclass(frozen=True)
class JudgedRows(PairRows):
    """Turns rows with one answer into examples, with `label` 1 for a good one and 0 for any other.

    A row with two answers becomes two examples, one behind the other; `second` is 1 for the latter.
    """

    columns: ClassVar[tuple[str, ...]] = ("label", "second")
    forms: ClassVar[tuple[str, ...]] = tuple(form.name for form in (*JUDGED_FORMS, *PAIR_FORMS))
    judged: ClassVar[bool] = True

    def _examples(self, outcome: RowOutcome, found: Preference) -> list[RowOutcome]:
        if len(found.answers) == 1:
            return [outcome]
        second = RowOutcome(outcome.row, chat=outcome.other, piece=1, pieces=2, liked=found.answers[1].liked)
        second.answer_turns, outcome.answer_turns = outcome.answer_turns[1:], outcome.answer_turns[:1]
        outcome.other, outcome.pieces = [], 2
        return [outcome, second]

    def _compared(self, outcomes: list[RowOutcome]) -> list[RowOutcome]:
        """Drop pairs of equal answers, each as one row."""
        kept: list[RowOutcome] = []
        for outcome in outcomes:
            if outcome.piece and _equal(kept[-1], outcome):
                kept[-1].encoded, kept[-1].reason, kept[-1].pieces = None, EQUAL, 1
            else:
                kept.append(outcome)
        return kept

    def _joined(self, parts: Sequence[Encoded], outcome: RowOutcome) -> Encoded:
        values = {"label": float(outcome.liked), "second": float(outcome.piece)}
        return super()._joined(parts, outcome)._replace(values=values)


def _equal(one: RowOutcome, other: RowOutcome) -> bool:
    """Whether two chats are the same to the model."""
    return bool(one.encoded and other.encoded and one.encoded.input_ids == other.encoded.input_ids)


def parts_of(example: Encoded) -> list[Encoded]:
    """The conversations of an example."""
    ends = list(itertools.accumulate(example.lengths))
    return [
        Encoded(example.input_ids[start:end], example.labels[start:end])
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _chats(outcome: RowOutcome) -> list[list[Message]]:
    return [outcome.chat, outcome.other] if outcome.other else [outcome.chat]
