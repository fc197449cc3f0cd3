"""Finds rows that belong on one side of a run: copies, near copies, and answers to one question.

A model that is measured on a copy of what it was trained on seems better than it is. The same holds for a near copy,
and to a lesser degree for another answer to the same question.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from phinetune.chats.template import Message
from phinetune.data.prepare.duplicates import Hashes, exact_key, hashes_of
from phinetune.data.prepare.encode_rows import RowOutcome, tag_of
from phinetune.data.prepare.shared_rows import Shared

# What more than one in so many rows have in common, and more than so many rows, is the form of the task (an instruction
# for all of them, for example) and makes no copies of them.
FORM = 4
Marks = Sequence[Hashable | None]  # for each row, what it has in common with others; None: nothing


@dataclass(frozen=True)
class SetKeys:
    """What the rows of a set are compared by, in order.

    Attributes:
        rows: equal for rows that are copies but for white space and case; None for a row that can't be used.
        asked: equal for rows with the same turns before the first answer; None for a row that is no chat.
        near: equal for rows that are nearly equal; None if they were not looked for.
        group: what rows have in the column `data.group`; None without such a column.
        texts: the rows as texts, if they are in memory; `stored`: the shingles of rows on disk.
    """

    rows: Marks
    asked: Marks
    near: Marks | None = None
    group: Marks | None = None
    texts: Sequence[str] = ()
    stored: Iterable[Hashes] = ()

    def shingles(self) -> Iterable[Hashes]:
        """What the rows are compared by to find near copies, in order."""
        return map(hashes_of, self.texts) if self.texts else self.stored

    def at(self, places: Sequence[int]) -> SetKeys:
        """The keys of the rows at some places. They are in memory."""
        rows, asked = ([marks[place] for place in places] for marks in (self.rows, self.asked))
        near, group = (None if one is None else [one[place] for place in places] for one in (self.near, self.group))
        return SetKeys(rows, asked, near, group, [self.texts[place] for place in places] if self.texts else ())


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
    texts = [compared_text(outcome) for outcome in outcomes]
    groups = [tag_of(outcome.row, group) or None for outcome in outcomes] if group else None
    return SetKeys([row for row, _ in keys], [asked for _, asked in keys], None, groups, texts)


def compared_text(outcome: RowOutcome) -> str:
    """The text by which near copies of a row are found; empty if it has none. Ids have no words to compare."""
    return text_of(outcome.messages) or outcome.text or ""


def groups_of(keys: SetKeys) -> list[int]:
    """For each row the number of its group, which is that of the group's first row.

    Copies make a group. So do near copies and rows with one question, unless so many rows have them in common that it
    is the form of the task (`FORM`), or everything would be one group. Rows that the user's own column joins always
    do.
    """
    named = [keys.group] if keys.group else []
    copies = joined(len(keys.rows), [keys.rows, *named])
    alike = [keys.rows, _not_the_form(keys.asked), _not_the_form(keys.near or []), *named]
    groups = joined(len(keys.rows), alike)
    return copies if len(set(groups)) == 1 else groups


def _not_the_form(marks: Marks) -> Marks:
    """The marks, without those that more rows have than `FORM` allows."""
    common = {mark for mark, count in Counter(marks).items() if count > max(FORM, len(marks) // FORM)}
    return [None if mark in common else mark for mark in marks]


class Groups:
    """Rows that are joined, directly or through others. A group has the number of its first row.

    Args:
        count: how many rows there are.
    """

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def of(self, row: int) -> int:
        """The number of a row's group."""
        while self._above[row] != row:
            self._above[row] = self._above[self._above[row]]
            row = self._above[row]
        return row

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        a, b = self.of(one), self.of(other)
        self._above[max(a, b)] = min(a, b)


def joined(count: int, marks: Sequence[Marks]) -> list[int]:
    """Join rows that share a mark of the same kind. For each row the number of its group, see `Groups`."""
    groups = Groups(count)
    for one_kind in marks:
        first: dict[Hashable, int] = {}
        for row, mark in enumerate(one_kind):
            if mark is not None:
                groups.join(first.setdefault(mark, row), row)
    return [groups.of(row) for row in range(count)]


def count_shared(train: SetKeys, held_out: SetKeys) -> Shared:
    """Compare the rows of both sides, as `near_between` returned them, or as parts of one set that `with_near` did.

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
