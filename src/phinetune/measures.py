"""What a model is measured by: one list for tables, cards and whoever compares."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """One number of an evaluation: its key in results.json, its heading, its format, which way is better."""

    key: str
    heading: str
    form: str
    more_is_better: bool

    def change(self, before: float, after: float) -> tuple[str, bool]:
        """The signed difference in this measure's format, and whether it is one for the better."""
        difference = after - before
        better = difference > 0 if self.more_is_better else difference < 0
        return self.form.replace("{:", "{:+").format(difference), better


MEASURES = (
    Measure("loss", "loss (nats a token)", "{:.4f}", False),
    Measure("perplexity", "perplexity", "{:.2f}", False),
    Measure("token_accuracy", "token accuracy %", "{:.1f}", True),
    Measure("rouge_l", "ROUGE-L", "{:.1f}", True),
    Measure("chrf", "chrF", "{:.1f}", True),
    Measure("exact_match", "exact match %", "{:.1f}", True),
    Measure("stopped", "stopped by itself %", "{:.1f}", True),
)
