"""What becomes of each row: read, checked, rendered, encoded, cut or dropped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from phinetune.chat.encoder import ChatEncoder, Encoded
from phinetune.chat.row_error import RowError
from phinetune.chat.template import Message
from phinetune.config.run import DataSection
from phinetune.data.read.forms import READY, check_letters, detect_form, size_of, strings, to_messages
from phinetune.data.read.rows import Row
from phinetune.engine.scoring import IGNORED

BATCH = 512  # chats tokenised in one call; the tokenizer spreads a call over the cores
HUGE = 400_000  # letters and numbers: beyond it (and beyond 40 a token of max_length) no row is a chat
TURNS = 1_000  # nor beyond so many turns
NOTHING_TRAINED = "no token to train on"


@dataclass
class RowOutcome:
    """What became of one row.

    Attributes:
        form: as detected or configured; None where no form fits.
        messages: the chat as the row has it; empty for rows that are text or ids.
        chat: the chat as it is rendered, before any cut.
        fitted: what a cut left of it.
        encoded: ids and labels, None where the row was dropped.
        reason: why it was dropped.
        error: set where the row can't be used at all, as against being too long.
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

    def refuse(self, error: RowError) -> None:
        self.encoded, self.error, self.reason = None, error, str(error)


def tag_of(row: Row, column: str) -> str:
    """What a row has in the column that results are split by; nothing where it has none."""
    return str(row.fields.get(column, ""))


def is_huge(row: Row, max_length: int | None) -> bool:
    """Whether a row is far too long to be a chat, so that a look at its words would take minutes."""
    return _turns(row) > TURNS or size_of(row.fields) > max(HUGE, 40 * (max_length or 0))


def describe_size(row: Row) -> str:
    """How long a row is, in words."""
    return f"{sum(map(len, strings(row.fields))):,} characters of text, {_turns(row):,} turns"


def _turns(row: Row) -> int:
    lists = [value for value in row.fields.values() if isinstance(value, list)]
    return max((len(value) for value in lists if value and isinstance(value[0], Mapping)), default=0)


def outcomes(
    rows: Iterable[Row], section: DataSection, encoder: ChatEncoder, max_length: int | None
) -> Iterator[RowOutcome]:
    """The outcome of each row, in order; the rows are taken a batch at a time."""
    waiting = iter(rows)
    while batch := [_read(row, section, encoder) for row in itertools.islice(waiting, BATCH)]:
        _encode(batch, encoder)
        for made in batch:
            _fit(made, section, encoder, max_length)
            yield made


def _read(row: Row, section: DataSection, encoder: ChatEncoder) -> RowOutcome:
    made = RowOutcome(row)
    try:
        form = detect_form(row.fields) if section.format == "auto" else section.format
        if form == "tokens":
            made.encoded = read_ids(row.fields, encoder.vocabulary)
        elif form == "text":
            made.text = read_text(row.fields)
        else:
            made.messages = to_messages(row.fields, form)
            made.chat = encoder.prepare(made.messages)
        made.form = form
    except RowError as error:
        made.refuse(error)
    return made


def read_text(fields: Mapping[str, Any]) -> str:
    """The text of a row `{"text": …}`.

    Raises:
        RowError: there is none, or it can't be encoded.
    """
    text = fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError("`text` must be text, and not empty", "content")
    check_letters(text)
    return text


def read_ids(fields: Mapping[str, Any], vocabulary: int) -> Encoded:
    """The ids of a row `{"input_ids": …, "labels": …}`; without labels, every token is trained on.

    Raises:
        RowError: no list of ids of this vocabulary, or labels that are not -100 or the id at the same place.
    """
    ids, labels = fields.get("input_ids"), fields.get("labels")
    if not _are_ids(ids) or not ids:
        raise RowError("`input_ids` must be a list of whole numbers", "labels")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RowError(
            f"`input_ids` holds {max(ids) if min(ids) >= 0 else min(ids)}, and this tokenizer's ids go from 0 to "
            f"{vocabulary - 1}; the row was made for another tokenizer",
            "labels",
        )
    if labels is None:
        return Encoded(list(ids), list(ids))
    if not _are_ids(labels) or len(labels) != len(ids):
        raise RowError("`labels` must be a list of whole numbers as long as `input_ids`", "labels")
    wrong = next((i for i, label in enumerate(labels) if label not in (IGNORED, ids[i])), None)
    if wrong is not None:
        raise RowError(
            f"`labels` must hold {IGNORED} or the id at the same place (they are shifted in training), and place "
            f"{wrong} holds {labels[wrong]} beside id {ids[wrong]}",
            "labels",
        )
    return Encoded(list(ids), list(labels))


def _are_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(i) is int for i in value)


def _encode(batch: Sequence[RowOutcome], encoder: ChatEncoder) -> None:
    texts = [made for made in batch if made.text is not None and made.error is None]
    for made, encoded in zip(texts, encoder.encode_texts([made.text or "" for made in texts]), strict=True):
        made.encoded = encoded
    chats = [made for made in batch if made.error is None and made.form not in READY]
    try:
        for made, encoded in zip(chats, encoder.encode([made.chat for made in chats]), strict=True):
            made.encoded = encoded
    except (RowError, TemplateError, TypeError, ValueError):
        for made in chats:
            _encode_alone(made, encoder)


def _encode_alone(made: RowOutcome, encoder: ChatEncoder) -> None:
    """Encode one chat, to find out which of a batch the template refuses."""
    try:
        made.encoded = encoder.encode([made.chat])[0]
    except RowError as error:
        made.refuse(error)
    except (TemplateError, TypeError, ValueError) as error:
        made.refuse(RowError(f"the chat template refuses it: {error}", "template"))


def _fit(made: RowOutcome, section: DataSection, encoder: ChatEncoder, max_length: int | None) -> None:
    """Cut or drop what is too long, and drop what trains nothing."""
    if made.encoded is None:
        return
    if max_length and len(made.encoded.input_ids) > max_length:
        can_cut = section.overlong == "cut" and made.form not in READY
        fitted = encoder.fit_chat(made.chat, max_length) if can_cut else None
        if fitted is None:
            made.encoded, made.reason = None, f"longer than {max_length} tokens"
            return
        made.fitted, made.encoded = fitted
        made.cut = True
    if not made.encoded.trainable:
        made.refuse(RowError(NOTHING_TRAINED, "untrained"))
