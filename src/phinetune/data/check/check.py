"""`phinetune data check`: every row looked at before a run is, and what stands out, with file and line."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from phinetune.chat.encoder import ChatEncoder
from phinetune.config.run import DataSection
from phinetune.data.check.findings import KINDS, Findings
from phinetune.data.check.histogram import histogram
from phinetune.data.check.languages import Languages
from phinetune.data.check.overlap import Overlap
from phinetune.data.check.scan import as_row, scan_file, unreadable
from phinetune.data.check.secrets import SECRETS, count_sensitive
from phinetune.data.check.text_checks import (
    call_troubles,
    letter_troubles,
    markup_troubles,
    text_troubles,
    turn_troubles,
)
from phinetune.data.prepare.build import Report
from phinetune.data.prepare.encode_rows import RowOutcome, outcomes
from phinetune.data.prepare.splits import held_out_places
from phinetune.data.read.forms import strings
from phinetune.data.read.rows import Broken, Row
from phinetune.errors import DataError

LONGEST_SHOWN = 3


@dataclass
class CheckReport:
    """What was found in the files.

    Attributes:
        files: the training files, of data sets their `split`.
        counts: rows of the training files; `held_out` those of the held-out ones.
        lengths: (tokens, trainable tokens) of each kept row.
        turns: turns by role, and tool calls.
        longest: the longest rows' (tokens, trainable tokens, place).
        sensitive: how often each kind of personal data or secret stands in the rows.
        checkpoint: what its template does with system messages, tool turns, tools and calls.
        left_out: why `--fix` leaves a row out, by its number among the rows of `files` that could be looked at.
    """

    files: Sequence[str]
    split: str
    counts: Report
    max_length: int | None
    checkpoint: dict[str, str]
    findings: Findings = field(default_factory=Findings)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    longest: list[tuple[int, int, str]] = field(default_factory=list)
    turns: Counter[str] = field(default_factory=Counter)
    languages: Languages = field(default_factory=Languages)
    sensitive: Counter[str] = field(default_factory=Counter)
    left_out: dict[int, str] = field(default_factory=dict)
    ends_a_turn: bool = False
    held_out: Report | None = None

    @property
    def spoiled(self) -> bool:
        return self.findings.spoil

    def to_dict(self) -> dict[str, Any]:
        longest = [{"where": w, "tokens": n, "trainable_tokens": t} for n, t, w in sorted(self.longest, reverse=True)]
        return {
            **self.counts.to_dict(),
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "max_length": self.max_length,
            "checkpoint": self.checkpoint,
            "turns": dict(self.turns),
            "rows_by_tokens": [one._asdict() for one in histogram(self.lengths)],
            "longest_rows": longest,
            "languages": dict(self.languages.counts),
            "sensitive": dict(self.sensitive),
            "findings": [found.to_dict() for found in self.findings.in_order()],
            "spoiled": self.spoiled,
        }


def check_files(
    files: Sequence[str],
    held_out: Sequence[str],
    section: DataSection,
    encoder: ChatEncoder,
    max_length: int | None,
    on_row: Callable[[], None] = lambda: None,
) -> CheckReport:
    """Look at every row of `files` and `held_out`, and whether one stands in both; a few rows are held at a time.

    Args:
        section: how the rows become tokens; its `eval`, where it is a fraction, splits the rows as a run would.
        max_length: tokens that a row may have; None is no limit.
        on_row: called after each row.
    """
    report = CheckReport(files, section.split, Report(", ".join(files)), max_length, describe_template(encoder))
    look = _Look(section, encoder, report)
    compared = Overlap(report.findings, section.format, report.left_out)
    count = 0
    for count, (outcome, why) in enumerate(look.at(files, report.counts), 1):
        on_row()
        if why:
            report.left_out[count - 1] = why
        _measure(outcome, encoder, report)
        if not outcome.error:
            compared.take_in(count - 1, outcome.row)
    if isinstance(section.eval, float) and not held_out:
        count = min(count, section.limit or count)
        compared.split(_held_out(count, section.eval, section.seed), section.eval, count)
    if held_out:
        report.held_out = Report(", ".join(held_out))
        for outcome, _ in look.at(held_out, report.held_out):
            on_row()
            compared.hold_out(outcome.row)
    if report.lengths and not report.ends_a_turn:
        report.findings.add("no_stop", ", ".join(files), "no label is an end-of-turn token")
    return report


def _held_out(count: int, share: float, seed: int) -> set[int]:
    try:
        return held_out_places(count, share, seed)
    except DataError:  # too few rows to split: the run says so
        return set()


def _measure(outcome: RowOutcome, encoder: ChatEncoder, report: CheckReport) -> None:
    """Turns of a row, and lengths where it is kept."""
    report.turns.update(m["role"] for m in outcome.messages if m["content"] or "tools" not in m)
    report.turns["tool call"] += sum(len(m.get("tool_calls", [])) for m in outcome.messages)
    if not outcome.encoded:
        return
    size = (len(outcome.encoded.input_ids), outcome.encoded.trainable)
    report.lengths.append(size)
    heapq.heappush(report.longest, (*size, outcome.row.where))
    if len(report.longest) > LONGEST_SHOWN:
        heapq.heappop(report.longest)
    report.ends_a_turn = report.ends_a_turn or any(i in encoder.end_of_turn for i in outcome.encoded.labels)


def describe_template(encoder: ChatEncoder) -> dict[str, str]:
    """What the checkpoint's template does with what not every template knows."""
    kept = {role: "dropped" if role in encoder.dropped_roles else "kept" for role in ("system", "tool")}
    treated = {"fold": "folded into the first question (data.system)", "drop": "left out (data.system)"}
    tools = {"argument": "kept", "message": "kept, in the system message", None: "dropped"}[encoder.tools.tools]
    calls = {"template": "kept", "content": "kept, between <|tool_call|> and <|/tool_call|>", None: "dropped"}
    return {
        "system messages": treated.get(encoder.system, kept["system"]),
        "tool turns": kept["tool"],
        "tools": tools,
        "tool calls": calls[encoder.tools.calls],
    }


@dataclass
class _Look:
    """The look at the rows of one set of files, one after the other."""

    section: DataSection
    encoder: ChatEncoder
    report: CheckReport

    def at(self, files: Sequence[str], counts: Report) -> Iterator[tuple[RowOutcome, str | None]]:
        """What becomes of each row, with all that stands out about it noted, and why it should not stay, if so."""
        for outcome in outcomes(self._rows(files, counts), self.section, self.encoder, self.report.max_length):
            counts.count(outcome)
            why = None
            for kind, detail in self._troubles(outcome):
                forgiven = self.section.invalid_rows == "drop" and outcome.error and kind == outcome.error.kind
                self.report.findings.add(kind, outcome.row.where, detail, spoils=False if forgiven else None)
                if KINDS[kind].left_out:
                    why = why or KINDS[kind].title
            yield outcome, why

    def _rows(self, files: Sequence[str], counts: Report) -> Iterator[Row]:
        """The rows that can be looked at; the rest becomes findings."""
        for file in files:
            empty = True
            for found in scan_file(file, self.section.split):
                empty = False
                row = as_row(found, self.report.max_length)
                if row is None:
                    self._pass_over(found, counts)
                    continue
                if isinstance(found, Broken):
                    self.report.findings.add(found.kind, found.where, found.problem)
                yield row
            if empty:
                self.report.findings.add("nothing", file)

    def _pass_over(self, found: Row | Broken, counts: Report) -> None:
        kind, detail = unreadable(found)
        self.report.findings.add(kind, found.where, detail)
        counts.rows += 1
        counts.dropped[KINDS[kind].title] += 1

    def _troubles(self, outcome: RowOutcome) -> Iterator[tuple[str, str]]:
        if outcome.error:
            yield outcome.error.kind, str(outcome.error)
        elif outcome.reason:
            yield "too_long", outcome.reason
        elif outcome.cut:
            yield "cut", ""
        yield from turn_troubles(outcome.messages)
        yield from call_troubles(outcome.messages)
        yield from markup_troubles(outcome.messages, self.encoder)
        yield from text_troubles(outcome.text or "", self.encoder)
        texts = list(strings(outcome.row.fields))
        # Each kind once a row.
        yield from {kind: detail for text in texts for kind, detail in letter_troubles(text)}.items()
        sensitive: Counter[str] = sum(map(count_sensitive, texts), Counter())
        self.report.sensitive += sensitive
        for kind, count in sensitive.items():
            yield ("secret" if kind in SECRETS else "personal"), f"{kind} × {count}" if count > 1 else kind
        odd = self.report.languages.add(outcome.messages)
        if odd:
            yield "language", odd
