"""A check's report on one screen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phinetune.data.check.check import CheckReport
from phinetune.data.check.findings import KINDS, Found
from phinetune.data.check.histogram import histogram
from phinetune.data.check.languages import MAX_CHATS
from phinetune.terminal_text import printable

WIDTH = 24
PLACES = 3


def show_check(report: CheckReport, console: Console) -> None:
    """Print what a person wants to know, the findings last."""
    for counts in (report.counts, report.held_out):
        if counts:
            for line in counts.lines():
                console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    if report.lengths:
        console.print(_histogram(report.lengths))
        longest = ", ".join(f"{where} ({n:,})" for n, _, where in sorted(report.longest, reverse=True))
        _line(console, "longest rows", longest)
    _line(console, "turns", ", ".join(f"{n:,} {what}" for what, n in report.turns.most_common() if n))
    _line(console, "languages", _shares(report))
    _line(console, "template", "; ".join(f"{what} {fate}" for what, fate in report.checkpoint.items()))
    _line(
        console, "personal data and secrets", ", ".join(f"{kind} × {n}" for kind, n in report.sensitive.most_common())
    )
    _show_findings(report, console)


def _line(console: Console, name: str, value: str) -> None:
    if value:
        console.print(Text.assemble((f"{name}: ", "bold"), printable(value)), soft_wrap=True)


def _shares(report: CheckReport) -> str:
    counts = report.languages.counts
    told = sum(counts.values())
    if not told:
        return ""
    shares = [f"{code} {count / told:.0%}" for code, count in counts.most_common(6)]
    first = f"first {MAX_CHATS:,}" if report.languages.chats >= MAX_CHATS else f"{report.languages.chats:,}"
    return f"{', '.join(shares)} (of {told:,} of the {first} chats, whose answers are long enough to tell)"


def _histogram(lengths: Sequence[tuple[int, int]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tokens a row", justify="right")
    table.add_column("rows")
    table.add_column("rows by trainable tokens")
    bins = histogram(lengths)
    most = max(max(one.rows, one.rows_by_trainable_tokens) for one in bins)
    for one in bins:
        bars = (_bar(count, most) for count in (one.rows, one.rows_by_trainable_tokens))
        table.add_row(f"{one.first:,}–{one.last:,}", *bars)
    return table


def _bar(count: int, most: int) -> str:
    return f"{'█' * math.ceil(WIDTH * count / most)} {count:,}" if count else ""


def _show_findings(report: CheckReport, console: Console) -> None:
    found = report.findings.in_order()
    if not found:
        sets = [counts for counts in (report.counts, report.held_out) if counts]
        said = any(counts.unused or counts.unused_values or counts.notes for counts in sets)
        console.print("Nothing else stands out." if said else "Nothing stands out.", highlight=False)
        return
    console.print("Findings (✗ would spoil a run):", style="bold", highlight=False)
    for one in found:
        console.print(_describe(one), soft_wrap=True)


def _describe(found: Found) -> Text:
    about = KINDS[found.kind]
    mark, colour = ("✗", "red") if found.spoils else ("·", "yellow")
    title, count = (about.title, "bold"), (f" ({found.count:,})", f"bold {colour}")
    text = Text.assemble((f"{mark} ", f"bold {colour}"), title, count, f"; {about.advice}")
    for place in found.places[:PLACES]:
        text.append(f"\n    {place.where}{': ' if place.detail else ''}{place.detail}", style="dim")
    if found.count > PLACES:
        text.append(f"\n    … and {found.count - PLACES:,} more", style="dim")
    return text
