"""Compares rows with each other: finds copies in the training files, and copies in training and held-out chats."""

from __future__ import annotations

from phinetune.data.check.findings import KINDS, Findings
from phinetune.data.prepare.copies import text_of
from phinetune.data.prepare.duplicates import NearDuplicates, exact_key
from phinetune.data.read.messages import detect_form, to_messages
from phinetune.data.read.row import Row
from phinetune.errors import RowError


def _text_of_row(row: Row, form: str) -> str:
    """A row as one text, for comparison. Empty if the row is not of a known form."""
    try:
        form = detect_form(row.fields) if form == "auto" else form
        if form == "tokens":
            return " ".join(map(str, row.fields["input_ids"]))
        return str(row.fields["text"]) if form == "text" else text_of(to_messages(row.fields, form))
    except (RowError, TypeError, KeyError):
        return ""


class Overlap:
    """Finds equal and nearly equal rows.

    First `take_in` gets the training rows one by one, then `hold_out` the held-out rows. It keeps the rows' places and
    keys, but not the rows.
    """

    def __init__(self, findings: Findings, form: str, left_out: dict[int, str]) -> None:
        """Make an empty comparison.

        Args:
            findings: gets what is found.
            form: the form of the rows, or `auto`.
            left_out: gets the numbers of rows that `--fix` leaves out, with the reason.
        """
        self._findings, self._form, self._left_out = findings, form, left_out
        self._where: dict[int, str] = {}
        self._first: dict[bytes, int] = {}
        self._copies: dict[int, list[int]] = {}
        self._near = NearDuplicates()

    def take_in(self, number: int, row: Row) -> None:
        """Compare a training row with the rows before it. Its number counts the training rows from 0."""
        self._where[number] = row.where
        text = _text_of_row(row, self._form)
        first = self._first.setdefault(exact_key(text), number)
        if first != number:
            self._copies.setdefault(first, [first]).append(number)
            self._findings.add("duplicate", row.where, f"like {self._where[first]}")
            self._left_out.setdefault(number, KINDS["duplicate"].title)
            return
        match = None if row.fields.get("input_ids") else self._near.add(number, text)
        if match is not None:
            self._findings.add("near", row.where, f"like {self._where[match]}")

    def hold_out(self, row: Row) -> None:
        """Compare a held-out row with all training rows."""
        text = _text_of_row(row, self._form)
        if not text:
            return
        first = self._first.get(exact_key(text))
        if first is None:
            near = self._near.find(text)
            if near is not None:
                self._findings.add("near_shared", self._where[near], f"held out at {row.where}")
            return
        for number in self._copies.get(first, [first]):
            self._findings.add("shared", self._where[number], f"held out at {row.where}")
            self._left_out[number] = KINDS["shared"].title
