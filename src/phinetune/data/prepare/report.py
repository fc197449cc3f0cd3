"""Counts what became of the rows of one set, and says it in sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from phinetune.data.prepare.encode_rows import RowOutcome

REASONS_SHOWN = 4


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

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped), "forms": dict(self.forms)}

    def count(self, outcome: RowOutcome) -> None:
        """Count one row."""
        self.rows += 1
        self.cut += outcome.cut
        if outcome.form:
            self.forms[outcome.form] += 1
        if outcome.reason:
            self.dropped[outcome.reason] += 1
        if outcome.encoded:
            self.kept += 1
            self.tokens += len(outcome.encoded.input_ids)
            self.trainable_tokens += outcome.encoded.trainable
            self.longest = max(self.longest, len(outcome.encoded.input_ids))

    def lines(self) -> list[str]:
        """The report in sentences, for a person to read."""
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.most_common())
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
        ]
