"""Compares rows with each other: finds copies in the training files, and copies in training and held-out chats."""

from __future__ import annotations

from phinetune.data.check.findings import KINDS, Findings
from phinetune.data.prepare.copies import contrary_of, text_of_row
from phinetune.data.prepare.duplicates import NearDuplicates, exact_key, hashes_of
from phinetune.data.prepare.encode_rows import RowOutcome


def _text_of(outcome: RowOutcome) -> str:
    """A row as one text, for comparison, even one that is dropped. Empty if the row could not be read."""
    if outcome.form == "tokens":  # too many of them are not encoded
        return " ".join(map(str, outcome.row.fields["input_ids"]))
    return text_of_row(outcome)


class Overlap:
    """Finds equal and nearly equal rows.

    First `take_in` gets the training rows one by one, then `hold_out` the held-out rows. It keeps the rows' places and
    keys, but not the rows.
    """

    def __init__(self, findings: Findings, left_out: dict[int, str]) -> None:
        """Make an empty comparison.

        Args:
            findings: gets what is found.
            left_out: gets the numbers of rows that `--fix` leaves out, with the reason.
        """
        self._findings, self._left_out = findings, left_out
        self._where: dict[int, str] = {}
        self._first: dict[bytes, int] = {}
        self._copies: dict[int, list[int]] = {}
        self._near = NearDuplicates()

    def take_in(self, number: int, outcome: RowOutcome) -> None:
        """Compare a training row with the rows before it. Its number counts the training rows from 0."""
        where, text = outcome.row.where, _text_of(outcome)
        self._where[number] = where
        first = self._first.setdefault(exact_key(text), number)
        if first != number:
            self._copies.setdefault(first, [first]).append(number)
            self._findings.add("duplicate", where, f"like {self._where[first]}")
            self._left_out.setdefault(number, KINDS["duplicate"].title)
            return
        contrary = contrary_of(outcome)
        against = self._first.get(exact_key(contrary)) if contrary else None
        if against is not None:
            self._findings.add("contradiction", where, f"against {self._where[against]}")
            return
        match = None if outcome.form == "tokens" else self._near.add(number, hashes_of(text))
        if match is not None:
            self._findings.add("near", where, f"like {self._where[match]}")

    def hold_out(self, outcome: RowOutcome) -> None:
        """Compare a held-out row with all training rows."""
        where, text = outcome.row.where, _text_of(outcome)
        if not text:
            return
        first = self._first.get(exact_key(text))
        if first is None:
            near = self._near.find(hashes_of(text))
            if near is not None:
                self._findings.add("near_shared", self._where[near], f"held out at {where}")
            return
        for number in self._copies.get(first, [first]):
            self._findings.add("shared", self._where[number], f"held out at {where}")
            self._left_out[number] = KINDS["shared"].title
