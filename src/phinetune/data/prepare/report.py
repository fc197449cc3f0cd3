"""Counts what became of the rows of one set, and says it in sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phinetune.data.prepare.encode_rows import RowOutcome
from phinetune.data.read.audit import FLOATS, NULLS, RENDERED
from phinetune.data.read.plain_values import AS_JSON, WRITTEN
from phinetune.data.read.ready_rows import PADDED
from phinetune.data.read.row_mapping import GAP, NO_SYSTEM, OWN_SYSTEM

REASONS_SHOWN = 4
COLUMNS_SHOWN = 30
SAYS_WHAT_IS_TRAINED = re.compile("train|loss|mask|label|weight|ignore", re.IGNORECASE)
NOTES = {
    NULLS: "nulls left out of tools or tool calls (Parquet and Arrow add such nulls, and order the keys; calls as JSON "
    "text stay as they are)",
    FLOATS: "numbers such as 2.0 in tools or tool calls (Parquet and Arrow may have made them of 2; calls as JSON text "
    "stay as they are)",
    RENDERED: "WARNING: prompts that hold this template's tokens already, so that training writes a second template "
    "around them; give such rows as `text`, or remove the tokens",
    PADDED: "WARNING: ids that begin or end with the same id again and again, and train on it; if that is padding, "
    "give `attention_mask`, or label it -100",
    WRITTEN: "numbers, dates or truth values written as text (3, 2024-05-01, true)",
    AS_JSON: "lists or objects written as JSON; name what is inside as column.key, if that is meant",
    GAP: "empty columns in a template, which leave a gap there",
    OWN_SYSTEM: "a system message of the row's own, which stays (data.system_text is for the others)",
    NO_SYSTEM: "rows of text or ids, which get no data.system_text",
}


@dataclass
class DataReport:
    """What became of the rows of one set.

    Attributes:
        source: the name of the set.
        rows: how many rows the set has; `kept`, `cut`: how many of them were kept, and were cut to fit.
        dropped: how many rows were dropped, by reason.
        forms: how many rows have each form.
        tokens: of the kept examples, with those that the template adds; `trainable_tokens`: those that are trained on.
        longest: tokens of the longest kept example.
        in_pieces: how many texts were cut into pieces; `pieces`: how many examples these are.
        unused: how many rows have words that reach no model, by column or key of a turn; `unused_values`: the same for
            numbers and the like.
        notes: how many rows each of `NOTES` is true of.
    """

    source: str
    rows: int = 0
    kept: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    trainable_tokens: int = 0
    longest: int = 0
    in_pieces: int = 0
    pieces: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    unused_values: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}

    def count(self, outcome: RowOutcome) -> None:
        """Count one row, or a further piece of one."""
        self.rows += outcome.piece == 0
        self.cut += outcome.cut
        self.in_pieces += outcome.piece == 1
        self.pieces += outcome.pieces > 1
        if outcome.form:
            self.forms[outcome.form] += 1
        if outcome.reason:
            self.dropped[outcome.reason] += 1
        self.count_audit(outcome.audit.unused, outcome.audit.notes)
        if outcome.encoded:
            self.kept += outcome.piece == 0
            self.tokens += len(outcome.encoded.input_ids)
            self.trainable_tokens += outcome.encoded.trainable
            self.longest = max(self.longest, len(outcome.encoded.input_ids))

    def count_audit(self, unused: Mapping[str, bool], notes: Iterable[str], rows: int = 1) -> None:
        """Count what of some rows reaches no model, and what storage may have changed in them.

        Args:
            unused, notes: as in `Audit`.
            rows: how many rows are like this.
        """
        for column, has_words in unused.items():
            (self.unused if has_words else self.unused_values)[column] += rows
        self.notes.update(dict.fromkeys(notes, rows))

    def unused_columns(self) -> str:
        """The columns and keys that reach no model, each with the rows that have it.

        First those that seem to say what is trained on, then those with words.
        """
        columns = {**self.unused}
        for column, count in self.unused_values.items():
            columns[column] = columns.get(column, 0) + count
        names = sorted(columns, key=lambda name: SAYS_WHAT_IS_TRAINED.search(name) is None)
        shown = [f"{name} ({columns[name]:,})" for name in names]
        rest = len(shown) - COLUMNS_SHOWN
        return ", ".join(shown[:COLUMNS_SHOWN]) + (f", and {rest} more" if rest > 0 else "")

    def _divided(self) -> str:
        """Which rows became several examples."""
        pairs = any(form.startswith("pair") for form in self.forms)  # of which kto takes each answer by itself
        return "pairs taken answer by answer" if pairs else "texts cut into pieces"

    def lines(self) -> list[str]:
        """The report in sentences, for a person to read."""
        forms = ", ".join(f"{count} as {form}" for form, count in self.forms.most_common())
        forms = f" ({forms})" if forms else ""
        dropped = f", {sum(self.dropped.values())} dropped" if self.dropped else ""
        cut = f", {self.cut} cut to fit" if self.cut else ""
        rest = sum(count for _, count in self.dropped.most_common()[REASONS_SHOWN:])
        share = self.trainable_tokens / max(1, self.tokens)
        return [
            f"{self.source}: {self.rows} rows{forms}: {self.kept} kept{cut}{dropped}; {self.tokens:,} tokens, "
            f"{self.trainable_tokens:,} of them trained on ({share:.0%}); longest chat {self.longest} tokens",
            *(f"  dropped {count}: {reason}" for reason, count in self.dropped.most_common(REASONS_SHOWN)),
            *([f"  dropped {rest} for other reasons"] if rest else []),
            *([f"  {self._divided()}: {self.in_pieces:,}, now {self.pieces:,} examples"] if self.pieces else []),
            *([f"  columns not used: {self.unused_columns()}"] if self.unused or self.unused_values else []),
            *(f"  {NOTES[note]}: {count:,} rows" for note, count in sorted(self.notes.items())),
        ]


def replay_sentence(replay: Mapping[str, int]) -> str:
    """What of the base's own answers was mixed into the training rows (`data.replay`), in a sentence."""
    again = f", of {replay['prompts']:,} different prompts" if replay["prompts"] < replay["rows"] else ""
    return f"mixed in: {replay['rows']:,} answers of the base to neutral prompts{again}; {replay['tokens']:,} tokens"
