"""Finds rows that belong on one side of a run: copies, near copies, and answers to one question.

A model that is measured on a copy of what it was trained on seems better than it is. The same holds for a near copy,
and to a lesser degree for another answer to the same question.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from phinetune.chats.template import Message
from phinetune.data.prepare.duplicates import NearDuplicates, exact_key
from phinetune.data.prepare.encode_rows import RowOutcome, tag_of
from phinetune.data.prepare.shared_rows import Shared

# What more than one in so many rows have in common, and more than so many rows, is the form of the task (an instruction
# for all of them, for example) and makes no copies of them.
FORM = 4
NEAR_ROWS = 10_000  # rows among which near copies are looked for; it takes about half a millisecond each

Marks = Sequence[Hashable | None]  # for each row, what it has in common with others; None: nothing


@dataclass(frozen=True)
class SetKeys:
    """What the rows of a set are compared by, in order.

    Attributes:
        rows: equal for rows that are copies but for white space and case; None for a row that can't be used.
        asked: equal for rows with the same turns before the first answer; None for a row that is no chat.
        texts: the rows as texts; None if they are too many to look for near copies.
        near: equal for rows that are nearly equal; None if they were not looked for.
        group: what rows have in the column `data.group`; None without such a column.
    """

    rows: Marks
    asked: Marks
    texts: Sequence[str] | None = None
    near: Marks | None = None
    group: Marks | None = None

    def at(self, places: Sequence[int]) -> SetKeys:
        """The keys of the rows at some places."""
        rows, asked = ([marks[place] for place in places] for marks in (self.rows, self.asked))
        others = (self.texts, self.near, self.group)
        texts, near, group = (None if one is None else [one[place] for place in places] for one in others)
        return SetKeys(rows, asked, texts, near, group)  # type: ignore[arg-type]


def text_of(messages: Sequence[Message]) -> str:
    """A chat as one text, for comparison."""
    turns = []
    for message in messages:
        calls = json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else ""
        turns.append(f"{message['role']}: {message['content']}{calls}")
    return "\n".join(turns)


def text_of_row(outcome: RowOutcome) -> str:
    """A row as one text, for comparison. Empty if the row can't be used.

    Of a preference it says which answer is rejected too: the same answer is preferred to others, or judged twice.
    """
    if outcome.messages:
        return _judged(text_of(outcome.messages), text_of(outcome.rejected), outcome.liked)
    if outcome.text is not None:
        return outcome.text
    ids = outcome.encoded.input_ids if outcome.encoded else []
    return " ".join(map(str, ids))


def contrary_of(outcome: RowOutcome) -> str:
    """The text of a row that prefers the other answer, or judges the same one otherwise. Empty where none can."""
    turns = sum(outcome.answer_turns[:1])
    if not turns or not outcome.messages:
        return ""
    if not outcome.rejected:
        return _judged(text_of(outcome.messages), "", not outcome.liked)
    asked, chosen = outcome.messages[:-turns], outcome.messages[-turns:]
    return _judged(text_of([*asked, *outcome.rejected]), text_of(chosen), True)


def _judged(text: str, rejected: str, liked: bool) -> str:
    more = f"\nrejected: {rejected}" if rejected else ""
    return f"{text}{more}" if liked else f"{text}\nnot liked"


def key_of(outcome: RowOutcome) -> tuple[bytes | None, bytes | None]:
    """What a row is compared by: as a whole, and by the turns before its first answer (see `SetKeys`)."""
    text = text_of_row(outcome)
    roles = [message["role"] for message in outcome.messages]
    asked = outcome.messages[: roles.index("assistant")] if "assistant" in roles else []
    if outcome.text is not None:
        asked = outcome.chat[:1]
    return exact_key(text) if text else None, exact_key(text_of(asked)) if asked else None


def keys_of(outcomes: Sequence[RowOutcome], group: str | None = None) -> SetKeys:
    """The keys of rows in memory.

    Args:
        group: the column `data.group`.
    """
    keys = [key_of(outcome) for outcome in outcomes]
    texts = [text_of(outcome.messages) or outcome.text or "" for outcome in outcomes]  # ids have no words to compare
    groups = [tag_of(outcome.row, group) or None for outcome in outcomes] if group else None
    return SetKeys([row for row, _ in keys], [asked for _, asked in keys], texts, None, groups)


def with_near(*sets: SetKeys) -> list[SetKeys]:
    """The sets with what is nearly equal in all of them together; as they are if there are too many rows to look."""
    texts: list[str] = []
    for one in sets:
        if one.texts is None or len(texts) + len(one.texts) > NEAR_ROWS:
            return list(sets)
        texts += one.texts
    marks = iter(_near(texts))
    return [replace(one, near=[next(marks) for _ in one.rows]) for one in sets]


def groups_of(keys: SetKeys) -> list[int]:
    """For each row the number of its group, which is that of the group's first row.

    Copies make a group. So do near copies and rows with one question, unless so many rows have them in common that it
    is the form of the task (`FORM`), or everything would be one group. Rows that the user's own column joins always
    do.
    """
    named = [keys.group] if keys.group else []
    copies = _joined(len(keys.rows), [keys.rows, *named])
    alike = [keys.rows, _not_the_form(keys.asked), _not_the_form(keys.near or []), *named]
    groups = _joined(len(keys.rows), alike)
    return copies if len(set(groups)) == 1 else groups


def _near(texts: Sequence[str]) -> list[int | None]:
    """For each text the number of the first one that it is nearly equal to, its own if that is it."""
    found = NearDuplicates()
    matches = [found.add(number, text) for number, text in enumerate(texts)]
    heads = {match for match in matches if match is not None}
    return [number if number in heads else match for number, match in enumerate(matches)]


def _not_the_form(marks: Marks) -> Marks:
    """The marks, without those that more rows have than `FORM` allows."""
    common = {mark for mark, count in Counter(marks).items() if count > max(FORM, len(marks) // FORM)}
    return [None if mark in common else mark for mark in marks]


def _joined(count: int, marks: Sequence[Marks]) -> list[int]:
    """Join rows that share a mark of the same kind, directly or through others."""
    group = list(range(count))

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = group[group[row]]
            row = group[row]
        return row

    for one_kind in marks:
        first: dict[Hashable, int] = {}
        for row, mark in enumerate(one_kind):
            if mark is not None:
                a, b = root(first.setdefault(mark, row)), root(row)
                group[max(a, b)] = min(a, b)
    return [root(row) for row in range(count)]


def count_shared(train: SetKeys, held_out: SetKeys) -> Shared:
    """Compare the rows of both sides, both as `with_near` returned them.

    A question, and a likeness, that are the form of the task are not counted.
    """
    total = len(train.rows)
    known = set(train.group or ()) - {None}
    same_group = sum(mark in known for mark in held_out.group or ())
    near = None if train.near is None or held_out.near is None else _not_the_form([*train.near, *held_out.near])
    kinds = [[*train.rows, *held_out.rows], near or [], _not_the_form([*train.asked, *held_out.asked])]
    counts, copied = [0, 0, 0], []
    trained = [set(marks[:total]) - {None} for marks in kinds]
    for row in range(total, total + len(held_out.rows)):
        first = next((i for i, marks in enumerate(kinds) if marks and marks[row] in trained[i]), None)
        if first is not None:
            counts[first] += 1
            if first < 2:
                copied.append(row - total)
    near_copies = None if near is None else counts[1]
    return Shared(len(held_out.rows), counts[0], near_copies, counts[2], same_group, tuple(copied))
