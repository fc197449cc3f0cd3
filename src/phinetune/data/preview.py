"""Shows a row as the model will see it: its tokens turn by turn, which are trained on, and what was cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from phinetune.chats.encoder import ChatEncoder
from phinetune.chats.template import Message, render, tokenize
from phinetune.data.prepare.encode_answers import parts_of
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome, describe_size, is_huge
from phinetune.data.prepare.first_rows import LOOKED_AT, look_at_first
from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.row import Broken, Row
from phinetune.data.read.row_mapping import RowMapping
from phinetune.engine.examples import IGNORED, Encoded, common_prefix

_ANCHOR = "a"  # put before tokens when they are decoded, because decoding treats the beginning of a text in another way


class TokenText(NamedTuple):
    """One token as text, or the several tokens of one rare character.

    Attributes:
        special: whether it is a special or an added token.
        trained: whether it is trained on.
    """

    text: str
    special: bool
    trained: bool


class Turn(NamedTuple):
    """The tokens of one turn, and a remark to show after it."""

    role: str
    pieces: list[TokenText]
    remark: str = ""


@dataclass(frozen=True)
class PreviewedRow:
    """One row as the model will see it.

    Attributes:
        where: file and line.
        form: the row's form; None if the row could not be read.
        tokens, trainable: how many tokens it has, and how many of them are trained on; 0 if the row is dropped.
        cut: whether its prompt was cut to fit.
        pieces: how many pieces a text was cut into; the first one is shown.
        unused: columns and keys of turns that reach no model.
        turns: its tokens, turn by turn.
        problem: why the row is dropped or can't be read; None for a row that is kept.
        broken: whether the place holds no row that can be read.
    """

    where: str
    form: str | None = None
    tokens: int = 0
    trainable: int = 0
    cut: bool = False
    pieces: int = 1
    unused: Sequence[str] = ()
    turns: Sequence[Turn] = ()
    problem: str | None = None
    broken: bool = False


def preview_rows(source: str, encode: RowEncoder, rows: int, first: int = 0) -> Iterator[PreviewedRow]:
    """The first `rows` rows of a source, or those after its first `first` rows.

    Raises:
        DataError: the source does not exist, or is of an unknown kind.
    """
    section = encode.section
    every = scan_rows(source, section.split, section.name, text_by=section.text_by)
    head = list(islice(every, LOOKED_AT))
    mapping = RowMapping.of(section)
    if mapping and not mapping.function:
        look_at_first(source, [row for row in head if isinstance(row, Row)], section, encode.forms)
    for row in islice(chain(head, every), first, first + rows):
        if not isinstance(row, Broken) and is_huge(row, encode.max_length):
            row = Broken(row.where, f"far too long to be a chat: {describe_size(row)}")
        yield preview_row(row, encode.encoder) if isinstance(row, Broken) else _previewed(list(encode([row])), encode)


def _previewed(outcomes: Sequence[RowOutcome], encode: RowEncoder) -> PreviewedRow:
    """A row with all of its answers; of a text that is cut into pieces the first piece."""
    first = preview_row(outcomes[0], encode.encoder)
    if not outcomes[0].answer_turns or len(outcomes) == 1:
        return first
    shown = [preview_row(one, encode.encoder) for one in outcomes]
    if all(one.problem is not None for one in shown):
        return first
    left_out = [Turn("", [], f"✂ an answer is left out: {one.problem}") for one in shown if one.problem is not None]
    return replace(
        first,
        tokens=sum(one.tokens for one in shown),
        trainable=sum(one.trainable for one in shown),
        cut=any(one.cut for one in shown),
        pieces=1,
        turns=[*(turn for one in shown for turn in one.turns), *left_out],
        problem=None,
    )


def preview_row(outcome: RowOutcome | Broken, encoder: ChatEncoder) -> PreviewedRow:
    """What became of one row, for a person to look at."""
    if isinstance(outcome, Broken):
        return PreviewedRow(outcome.where, problem=outcome.problem, broken=True)
    if not outcome.encoded:
        return PreviewedRow(outcome.row.where, outcome.form, problem=outcome.reason or "")
    return PreviewedRow(
        outcome.row.where,
        outcome.form,
        tokens=len(outcome.encoded.input_ids),
        trainable=outcome.encoded.trainable,
        cut=outcome.cut,
        pieces=outcome.pieces,
        unused=outcome.audit.in_order(),
        turns=turns_of(outcome, encoder),
    )


def turns_of(outcome: RowOutcome, encoder: ChatEncoder) -> list[Turn]:
    """The row's tokens turn by turn. A remark says where something was cut."""
    row = outcome.encoded or Encoded([], [])
    if outcome.answer_turns and row.lengths:
        return _answers(outcome, encoder)
    chat = outcome.fitted or outcome.chat
    if not chat or outcome.text is not None:
        return [Turn(outcome.form or "row", list(pieces(encoder.tokenizer, row)))]
    return _turns(row, chat, _remarks(outcome.chat, chat) if outcome.cut else {}, encoder)


def _answers(outcome: RowOutcome, encoder: ChatEncoder) -> list[Turn]:
    """A prompt with its answer; of a pair, the turns of the rejected answer follow."""
    assert outcome.encoded
    chats = [outcome.fitted or outcome.chat, outcome.other_fitted or outcome.other]
    names = ("chosen", "rejected") if outcome.other else ("good" if outcome.liked else "not good",)
    shown: list[Turn] = []
    for i, (part, count, name) in enumerate(zip(parts_of(outcome.encoded), outcome.answer_turns, names, strict=True)):
        remarks = _remarks(outcome.chat, chats[0]) if outcome.cut and not i else {}
        turns = _turns(part, chats[i], remarks, encoder)
        answer = [turn._replace(role=name) if turn.role == "assistant" else turn for turn in turns[-count:]]
        shown += answer if i else [*turns[:-count], *answer]
    return shown


def _turns(row: Encoded, chat: Sequence[Message], remarks: dict[int, str], encoder: ChatEncoder) -> list[Turn]:
    ends = turn_ends(encoder.tokenizer, chat, row.input_ids)
    turns = [Turn("", [], remarks[-1])] if -1 in remarks else []
    for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        part = Encoded(row.input_ids[start:end], row.labels[start:end])
        turns.append(Turn(chat[i]["role"], list(pieces(encoder.tokenizer, part)), remarks.get(i, "")))
    return turns


def turn_ends(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], ids: Sequence[int]) -> list[int]:
    """For each turn, the index after its last token. The header before a turn's content belongs to the turn."""
    ends: list[int] = []
    for i in range(1, len(chat)):
        try:
            part = tokenize(tokenizer, [render(tokenizer, chat[:i])])[0]
            ends.append(max([*ends[-1:], common_prefix(part, ids)]))
        except Exception:  # a template may refuse half a chat with any error; then these turns are shown as one
            ends.append(ends[-1] if ends else 0)
    return [*ends, len(ids)]


def _remarks(whole: Sequence[Message], left: Sequence[Message]) -> dict[int, str]:
    """What was cut, by the index of the turn after which to say it (-1: before the first).

    Args:
        whole: the chat before it was cut.
        left: what is left of it.
    """
    head = int(left[0]["role"] == "system" and whole[0]["role"] == "system")
    gone = len(whole) - len(left)
    remarks = {head - 1: f"✂ {gone} turn{'s' if gone > 1 else ''} left out to fit"} if gone else {}
    for i in range(head, len(left)):
        short = len(whole[i + gone]["content"]) - len(left[i]["content"])
        if short:
            remarks[i] = f"✂ the last {short:,} characters of this turn cut to fit"
    return remarks


def pieces(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> Iterator[TokenText]:
    """A row's tokens as text, each by itself. Several tokens that make one character stay together."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    anchor = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    before = len(str(tokenizer.decode(anchor)))
    waiting: list[int] = []
    for place, token in enumerate(row.input_ids):
        trained = row.labels[place] != IGNORED
        if token in special:
            yield TokenText(str(tokenizer.convert_ids_to_tokens(token)), True, trained)
            continue
        waiting.append(token)
        text = str(tokenizer.decode([*anchor, *waiting]))[before:]
        following = row.input_ids[place + 1] if place + 1 < len(row.input_ids) else None
        if "\ufffd" in text and len(waiting) < 4 and following is not None and following not in special:
            continue
        yield TokenText(text, False, trained)
        waiting = []
