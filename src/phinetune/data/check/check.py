"""`phinetune data check`: looks at every row before a run does, and says what stands out, with file and line."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from phinetune.chats.encoder import ChatEncoder
from phinetune.data.check.findings import KINDS, Findings
from phinetune.data.check.histogram import histogram
from phinetune.data.check.languages import Languages
from phinetune.data.check.overlap import Overlap
from phinetune.data.check.pairs import empty_answers, length_bias, words_of_answers
from phinetune.data.check.scan import as_row, scan_file, unreadable
from phinetune.data.check.secrets import SECRETS, count_sensitive
from phinetune.data.check.text_checks import (
    call_troubles,
    letter_troubles,
    markup_troubles,
    text_troubles,
    turn_troubles,
)
from phinetune.data.prepare.encode_answers import EQUAL
from phinetune.data.prepare.encode_rows import TOO_LONG, RowEncoder, RowOutcome
from phinetune.data.prepare.report import DataReport
from phinetune.data.read.messages import strings
from phinetune.data.read.preferences import ALIKE
from phinetune.data.read.row import Broken, Row

LONGEST_SHOWN = 3


@dataclass
class CheckReport:
    """What was found in the files.

    Attributes:
        files: the training files. Of a data set, `split` of the configuration `name` is read; `text_by` is what is
            a row of a text.
        counts: what became of the rows of the training files.
        checkpoint: what its template does with system messages, tool turns, tools and tool calls.
        lengths: the tokens and the trainable tokens of each kept row.
        longest: the tokens, the trainable tokens and the place of each of the longest rows.
        turns: how many turns there are of each role, and how many tool calls.
        sensitive: how often each kind of personal data or secret occurs in the rows.
        left_out: why `--fix` leaves a row out, by the row's number among the rows of `files` that could be checked.
        answer_words: of each pair of answers, how many words the chosen and the rejected one have.
        ends_a_turn: whether any label is an end-of-turn token.
        held_out: what became of the rows of the held-out files; None without such files.
    """

    files: Sequence[str]
    split: str
    counts: DataReport
    max_length: int | None
    checkpoint: dict[str, str]
    findings: Findings = field(default_factory=Findings)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    longest: list[tuple[int, int, str]] = field(default_factory=list)
    turns: Counter[str] = field(default_factory=Counter)
    languages: Languages = field(default_factory=Languages)
    sensitive: Counter[str] = field(default_factory=Counter)
    left_out: dict[int, str] = field(default_factory=dict)
    answer_words: list[tuple[int, int]] = field(default_factory=list)
    ends_a_turn: bool = False
    held_out: DataReport | None = None
    name: str | None = None
    text_by: str = "paragraph"

    @property
    def spoiled(self) -> bool:
        """Whether a finding would spoil a run."""
        return self.findings.spoil

    def to_dict(self) -> dict[str, Any]:
        longest = [{"where": w, "tokens": n, "trainable_tokens": t} for n, t, w in sorted(self.longest, reverse=True)]
        return {
            **self.counts.to_dict(),
            "held_out": self.held_out.to_dict() if self.held_out else None,
            "max_length": self.max_length,
            "checkpoint": self.checkpoint,
            "turns": dict(self.turns),
            "rows_by_tokens": [bar._asdict() for bar in histogram(self.lengths)],
            "longest_rows": longest,
            "languages": dict(self.languages.counts),
            "sensitive": dict(self.sensitive),
            "findings": [finding.to_dict() for finding in self.findings.in_order()],
            "spoiled": self.spoiled,
        }


def check_files(
    files: Sequence[str],
    held_out: Sequence[str],
    encode: RowEncoder,
    on_row: Callable[[], None] = lambda: None,
    encode_held_out: RowEncoder | None = None,
) -> CheckReport:
    """Look at every row of `files` and `held_out`, and find rows that are in both. Few rows are in memory at a time.

    Args:
        encode: how the rows become examples, and which split of a data set is read.
        on_row: called after each row.
        encode_held_out: the same for `held_out`, if it differs.
    """
    section, encoder = encode.section, encode.encoder
    counts, template = DataReport(", ".join(files)), describe_template(encoder)
    report = CheckReport(
        *(files, section.split, counts, encode.max_length, template), name=section.name, text_by=section.text_by
    )
    checker = _RowChecker(encode, report)
    overlap = Overlap(report.findings, report.left_out)
    count = 0
    for outcome, title in checker.check(files, report.counts):
        _measure(outcome, encoder, report)
        if outcome.piece:
            continue
        on_row()
        if title:
            report.left_out[count] = title
        if not outcome.error:
            overlap.take_in(count, outcome)
        count += 1
    if held_out:
        report.held_out = DataReport(", ".join(held_out))
        checker = _RowChecker(encode_held_out or encode, report)
        for outcome, _ in checker.check(held_out, report.held_out):
            if not outcome.piece:
                on_row()
                overlap.hold_out(outcome)
    bias = length_bias(report.answer_words)
    if bias:
        report.findings.add("length_bias", ", ".join(files), bias)
    if report.lengths and not report.ends_a_turn:
        report.findings.add("no_stop", ", ".join(files), "no label is an end-of-turn token")
    return report


def _measure(outcome: RowOutcome, encoder: ChatEncoder, report: CheckReport) -> None:
    """Add a row's turns to the report, and its lengths if it is kept."""
    report.turns.update(m["role"] for m in outcome.messages if m["content"] or "tools" not in m)
    report.answer_words += words_of_answers(outcome)
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
    """What the checkpoint's template does with the parts of a chat that not every template supports."""
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
class _RowChecker:
    """Checks rows one after the other, and adds findings to the report."""

    encode: RowEncoder
    report: CheckReport

    def check(self, files: Sequence[str], counts: DataReport) -> Iterator[tuple[RowOutcome, str | None]]:
        """What becomes of each row, and the title of the finding because of which it should be left out, if any.

        Args:
            counts: counts the rows of these files.
        """
        for outcome in self.encode(self._rows(files, counts)):
            counts.count(outcome)
            title = None
            for kind, detail in () if outcome.piece else self._troubles(outcome):
                forgiven = self.encode.section.invalid_rows == "drop" and outcome.error and kind == outcome.error.kind
                self.report.findings.add(kind, outcome.row.where, detail, spoils=False if forgiven else None)
                if KINDS[kind].left_out:
                    title = title or KINDS[kind].title
            yield outcome, title

    def _rows(self, files: Sequence[str], counts: DataReport) -> Iterator[Row]:
        """The rows that can be checked. For all other places a finding is added."""
        for file in files:
            empty = True
            section = self.encode.section
            for item in scan_file(file, section.split, section.name, section.text_by):
                empty = False
                row = as_row(item, self.report.max_length)
                if row is None:
                    self._skip(item, counts)
                    continue
                if isinstance(item, Broken):
                    self.report.findings.add(item.kind, item.where, item.problem)
                yield row
            if empty:
                self.report.findings.add("nothing", file)

    def _skip(self, item: Row | Broken, counts: DataReport) -> None:
        kind, detail = unreadable(item)
        self.report.findings.add(kind, item.where, detail)
        counts.rows += 1
        counts.dropped[KINDS[kind].title] += 1

    def _troubles(self, outcome: RowOutcome) -> Iterator[tuple[str, str]]:
        """The kind and the detail of each finding in a row."""
        if outcome.error:
            yield outcome.error.kind, str(outcome.error)
        elif outcome.reason in (EQUAL, ALIKE):
            yield "equal_answers", ""
        elif outcome.reason and outcome.reason.startswith(TOO_LONG):
            yield "too_long", outcome.reason
        elif outcome.cut:
            yield "cut", ""
        yield from turn_troubles(outcome.messages)
        yield from empty_answers(outcome)
        yield from call_troubles(outcome.messages)
        yield from markup_troubles(outcome.messages, self.encode.encoder)
        yield from text_troubles(outcome.text or "", self.encode.encoder)
        texts = list(strings(outcome.row.fields))
        # Each kind at most once for a row.
        yield from {kind: detail for text in texts for kind, detail in letter_troubles(text)}.items()
        sensitive: Counter[str] = sum(map(count_sensitive, texts), Counter())
        self.report.sensitive += sensitive
        for kind, count in sensitive.items():
            yield ("secret" if kind in SECRETS else "personal"), f"{kind} × {count}" if count > 1 else kind
        note = self.report.languages.add(outcome.messages)
        if note:
            yield "language", note
