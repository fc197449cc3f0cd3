"""Reads, checks, renders and encodes each row, and cuts or drops it if it is too long."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from jinja2 import TemplateError

from phinetune.chats.control import control_tokens
from phinetune.chats.encoder import ChatEncoder
from phinetune.chats.template import Message
from phinetune.config.data import OF_A_CHAT, DataSection
from phinetune.config.row_forms import ALL_FORMS, FORM_NAMES, READY
from phinetune.data.prepare.pieces import cut_beginning, cut_into_pieces
from phinetune.data.read.audit import RENDERED, Audit, audit_row, is_rendered
from phinetune.data.read.messages import detect_form, size_of, strings, to_messages
from phinetune.data.read.ready_rows import PADDED, read_ids, read_text, seems_padded
from phinetune.data.read.row import Row
from phinetune.data.read.row_mapping import NO_SYSTEM, LeftOut, MappedRow, RowMapping
from phinetune.engine.examples import Encoded
from phinetune.errors import ConfigError, RowError

BATCH = 512  # chats that are tokenised in one call; the tokenizer uses all cores for a call
# A row is no chat if it has more letters and numbers than this and than 40 per token of max_length, or more turns.
HUGE = 400_000
TURNS = 1_000
NOTHING_TRAINED = "no token to train on"
TOO_LONG = "longer than"


@dataclass
class RowOutcome:
    """What became of one row, or of a piece of a row of text.

    Attributes:
        form: the row's form, detected or configured; None if the row could not be read.
        messages: the chat as it stands in the row; empty for rows of text or ids.
        chat: the chat as it is rendered, before it is cut.
        fitted: what is left of the chat after it was cut; empty if it was not.
        text: the text of a row of text. Its chat, if it is known where its answer begins, is the prompt and the answer.
        encoded: token ids and labels; None if the row is dropped.
        reason: why the row is dropped; None if it is kept.
        error: why the row can't be used; None if it can, or is only too long.
        cut: whether the chat's prompt was cut.
        audit: what of the row reaches no model; empty for a row that can't be used.
        piece: which piece of its row it is, from 0; what is said of the row stands with the first.
        pieces: how many pieces the row was cut into.
        other: of a pair, the chat with the rejected answer; `other_fitted`: what is left of it after it was cut.
        answer_turns: of a row of preferences, how many turns each of its answers has.
        liked: of a row of preferences, whether the answer in `chat` is the liked one.
        rejected: of a pair, the turns of its rejected answer; the first outcome has them where a pair has two.
    """

    row: Row
    form: str | None = None
    messages: list[Message] = field(default_factory=list)
    chat: list[Message] = field(default_factory=list)
    fitted: list[Message] = field(default_factory=list)
    text: str | None = None
    encoded: Encoded | None = None
    reason: str | None = None
    error: RowError | None = None
    cut: bool = False
    audit: Audit = field(default_factory=Audit)
    piece: int = 0
    pieces: int = 1
    other: list[Message] = field(default_factory=list)
    other_fitted: list[Message] = field(default_factory=list)
    answer_turns: tuple[int, ...] = ()
    liked: bool = True
    rejected: list[Message] = field(default_factory=list)

    def refuse(self, error: RowError) -> None:
        """Drop the row because it can't be used."""
        self.encoded, self.error, self.reason = None, error, str(error)


def tag_of(row: Row, column: str) -> str:
    """What a row has in the column that results are split by; an empty text if it lacks this column."""
    value = row.fields.get(column)
    return "" if value is None else str(value)


def is_huge(row: Row, max_length: int | None) -> bool:
    """Whether a row is far too long to be a chat. Checks of its text would take minutes."""
    return _turns(row) > TURNS or size_of(row.fields) > max(HUGE, 40 * (max_length or 0))


def describe_size(row: Row) -> str:
    """How long a row is, in words."""
    return f"{sum(map(len, strings(row.fields))):,} characters of text, {_turns(row):,} turns"


def _turns(row: Row) -> int:
    lists = [value for value in row.fields.values() if isinstance(value, list)]
    return max((len(value) for value in lists if value and isinstance(value[0], Mapping)), default=0)


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into encoded examples. Each row is one conversation, as supervised fine-tuning takes it.

    An objective whose rows are different, or that needs more of a row, has a subclass.

    Attributes:
        section: how rows become tokens.
        encoder: the checkpoint's encoder of chats.
        max_length: how many tokens an example may have; None is no limit.
        columns: the names of the numbers that an example has besides its tokens.
        joins: whether an example holds several conversations.
        uses: columns of the rows that it reads beside those of their form.
        forms: the names of the forms of rows that it takes.
    """

    section: DataSection
    encoder: ChatEncoder
    max_length: int | None

    columns: ClassVar[tuple[str, ...]] = ()
    joins: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = ()
    forms: ClassVar[tuple[str, ...]] = FORM_NAMES

    def __post_init__(self) -> None:
        if self.section.format not in ("auto", *self.forms):
            raise ConfigError(
                f"data.format: rows of the form {self.section.format} are for another objective; this one takes "
                f"{', '.join(self.forms)}"
            )
        known = {key for form in ALL_FORMS if form.name in self.forms for key in form.read}
        others = [f"`{key}`" for key in self.section.columns if key not in known and key not in OF_A_CHAT]
        if others:
            raise ConfigError(f"data.columns: {', '.join(others)}: a key of rows for another objective; leave it out")
        if self.max_length and self.section.overlap >= self.max_length:
            raise ConfigError(
                f"data.overlap: {self.section.overlap} leaves no room for new tokens in a piece of a text; it must be "
                f"less than training_config.max_length ({self.max_length})"
            )

    def __call__(self, rows: Iterable[Row]) -> Iterator[RowOutcome]:
        """What becomes of each row, in order. Rows are read `BATCH` at a time.

        A text that is cut into pieces has an outcome for each of them.
        """
        waiting = iter(rows)
        read = _RowReader(self.section, self.encoder, self.taken, RowMapping.of(self.section))
        while batch := [read(row) for row in itertools.islice(waiting, BATCH)]:
            _encode(batch, self.encoder)
            for outcome in batch:
                yield from _fit(outcome, self.section, self.encoder, self.max_length)

    @property
    def taken(self) -> list[str]:
        """Columns of the rows that something reads beside those of their form."""
        return [*self.uses, *(one for one in (self.section.tag, self.section.group) if one)]

    def identity(self) -> dict[str, Any]:
        """What tells its examples from those of another encoder of rows, as JSON holds it.

        Prepared sets are found by it. An encoder that a user wrote changes it when its code or its own fields change.
        """
        common = {field.name for field in fields(RowEncoder)}
        own = {field.name: repr(getattr(self, field.name)) for field in fields(self) if field.name not in common}
        kind = type(self)
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # made where there is no file, in a notebook's first cell for example
            source = ""
        digest = hashlib.sha256(source.encode()).hexdigest()
        return {"rows": f"{kind.__module__}.{kind.__qualname__}", "source": digest, "fields": own}


@dataclass(frozen=True)
class _RowReader:
    """Reads rows: from their columns to the messages, the text or the ids that they hold.

    Attributes:
        taken: columns that something else uses.
        mapping: what makes a known form of the user's columns; None if they have one.
    """

    section: DataSection
    encoder: ChatEncoder
    taken: Sequence[str]
    mapping: RowMapping | None

    def __call__(self, row: Row) -> RowOutcome:
        outcome = RowOutcome(row)
        try:
            made = self.mapping(row.fields) if self.mapping else MappedRow(row.fields)
            self._read(made, outcome)
        except LeftOut as error:
            outcome.reason = str(error)
        except RowError as error:
            outcome.refuse(error)
        return outcome

    def _read(self, made: MappedRow, outcome: RowOutcome) -> None:
        section, encoder = self.section, self.encoder
        form = detect_form(made.fields) if section.format == "auto" else section.format
        if form == "tokens":
            outcome.encoded = read_ids(made.fields, encoder.vocabulary)
        elif form == "text":
            outcome.text = read_text(made.fields)
            outcome.chat = encoder.asked(outcome.text)
        else:
            outcome.messages = made.with_system(to_messages(made.fields, form))
            outcome.chat = encoder.prepare(outcome.messages)
        outcome.form = form
        audit_outcome(outcome, made, section, encoder, self.taken)
        outcome.audit.notes |= {NO_SYSTEM} if made.system and form in READY else set()
        if outcome.encoded and seems_padded(outcome.encoded):
            outcome.audit.notes.add(PADDED)


def audit_outcome(
    outcome: RowOutcome, made: MappedRow, section: DataSection, encoder: ChatEncoder, taken: Sequence[str]
) -> None:
    """Note what of a row reaches no model.

    Args:
        outcome: gets the notes; its form and its messages are known.
        taken: columns that something else uses.
    """
    assert outcome.form
    outcome.audit = audit_row(made.fields, outcome.form, encoder.reads, taken)
    for key, value in made.hidden.items():
        outcome.audit.add(key, value)
    outcome.audit.notes |= made.notes
    if any(is_rendered(message, control_tokens(encoder.tokenizer)) for message in outcome.messages):
        outcome.audit.notes.add(RENDERED)
    if section.system == "drop" and outcome.messages and outcome.messages[0]["role"] == "system":
        outcome.audit.add("system messages (data.system: drop)", outcome.messages[0]["content"])


def _encode(batch: Sequence[RowOutcome], encoder: ChatEncoder) -> None:
    texts = [outcome for outcome in batch if outcome.text is not None and outcome.error is None]
    for outcome, encoded in zip(texts, encoder.encode_texts([one.text or "" for one in texts]), strict=True):
        outcome.encoded = encoded
    chats = [outcome for outcome in batch if outcome.chat and outcome.text is None and outcome.error is None]
    try:
        for outcome, encoded in zip(chats, encoder.encode([one.chat for one in chats]), strict=True):
            outcome.encoded = encoded
    except (RowError, TemplateError, TypeError, ValueError):
        for outcome in chats:
            _encode_alone(outcome, encoder)


def _encode_alone(outcome: RowOutcome, encoder: ChatEncoder) -> None:
    """Encode one chat by itself, to find the chats of a batch that the template refuses."""
    try:
        outcome.encoded = encoder.encode([outcome.chat])[0]
    except RowError as error:
        outcome.refuse(error)
    except (TemplateError, TypeError, ValueError) as error:
        outcome.refuse(RowError(f"the chat template refuses it: {error}", "template"))


def _fit(
    outcome: RowOutcome, section: DataSection, encoder: ChatEncoder, max_length: int | None
) -> Iterator[RowOutcome]:
    """Cut or drop an example that is too long; a text becomes pieces. Drop one without a label."""
    if outcome.encoded and max_length and len(outcome.encoded.input_ids) > max_length:
        whole = not outcome.chat or section.loss_on == "all"
        if outcome.text is not None and section.overlong == "cut" and whole:
            yield from _pieces(outcome, cut_into_pieces(outcome.encoded, max_length, section.overlap))
            return
        shorter = _shortened(outcome, encoder, max_length) if section.overlong == "cut" else None
        if shorter:
            outcome.fitted, outcome.encoded = shorter
            outcome.cut = True
        else:
            outcome.encoded, outcome.reason = None, f"{TOO_LONG} {max_length} tokens"
    if outcome.encoded and not outcome.encoded.trainable:
        outcome.refuse(RowError(NOTHING_TRAINED, "untrained"))
    yield outcome


def _shortened(outcome: RowOutcome, encoder: ChatEncoder, max_length: int) -> tuple[list[Message], Encoded] | None:
    """What is left of a chat, or of a text with an answer, once it fits: the messages of the chat, and its encoding."""
    if outcome.text is not None and outcome.encoded:
        shorter = cut_beginning(outcome.encoded, max_length)
        return ([], shorter) if shorter else None
    return encoder.fit(outcome.chat, max_length) if outcome.form not in READY else None


def _pieces(outcome: RowOutcome, pieces: Sequence[Encoded]) -> Iterator[RowOutcome]:
    outcome.encoded, outcome.pieces = pieces[0], len(pieces)
    yield outcome
    for number, piece in enumerate(pieces[1:], 1):
        yield RowOutcome(outcome.row, encoded=piece, piece=number, pieces=len(pieces))
