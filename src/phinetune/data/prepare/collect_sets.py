"""Makes sets of encoded rows, in memory or on disk, and counts what became of the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from phinetune.chats.template import Message
from phinetune.config.data import DataSection
from phinetune.data.prepare.arrow_rows import Columns, StoredChats, StoredRows, trained_columns
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.copies import Marks
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome, tag_of
from phinetune.data.prepare.report import DataReport
from phinetune.data.read.row import Row
from phinetune.engine.examples import Encoded
from phinetune.errors import DataError, at_most


def build_set(name: str, rows: Iterable[Row], encode: RowEncoder) -> ChatSet:
    """Check and encode rows in memory, and count what becomes of them.

    Args:
        name: of the set, for its report.

    Raises:
        DataError: rows can't be used (unless `invalid_rows` is `drop`), or no row can.
    """
    return collect_set(name, encode(rows), encode)


def collect_set(name: str, outcomes: Iterable[RowOutcome], encode: RowEncoder) -> ChatSet:
    chats: list[list[Message]] = []
    examples: list[Encoded] = []
    places: list[int] = []
    tags: list[str] = []
    where: list[str] = []
    report = DataReport(name)
    problems: list[str] = []
    tag = encode.section.tag
    for outcome in outcomes:
        report.count(outcome)
        if outcome.error:
            problems.append(f"{outcome.row.where}: {outcome.error}")
        if outcome.encoded:
            examples.append(outcome.encoded)
            where.append(outcome.row.where)
            if tag:
                tags.append(tag_of(outcome.row, tag))
            if outcome.chat:
                chats.append(outcome.chat)
                places.append(len(examples) - 1)
    check_usable(report, problems, encode.section)
    return ChatSet(chats, examples, report, places, tags, where)


def check_usable(report: DataReport, problems: Sequence[str], section: DataSection) -> None:
    """Make sure that a set can be trained on.

    Args:
        report: what became of the set's rows.
        problems: a sentence for each row that can't be used.

    Raises:
        DataError: rows can't be used (unless `invalid_rows` is `drop`), or no row is kept.
    """
    if problems and section.invalid_rows == "fail":
        raise DataError([*at_most(problems), "(data.invalid_rows: drop leaves such rows out and counts them)"])
    if not report.kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise DataError(f"{report.source}: no chat to use: " + (reasons or "the set is empty"))


def stored_set(
    name: str, columns: Columns, places: Sequence[int], encode: RowEncoder, near: Marks | None = None
) -> ChatSet:
    """The set of a source's rows at `places`. A place may stand there several times.

    Args:
        near: of all rows of the source, which are nearly equal, if that is known.
    """
    lines = columns.lines_of(places)
    order = np.asarray(lines, dtype=np.int64)
    lengths, piece = columns.numbers("length")[order], columns.numbers("piece")[order]
    in_pieces = int((piece == 1).sum())
    report = DataReport(
        name,
        rows=len(places),
        kept=int(((lengths > 0) & (piece == 0)).sum()),
        cut=int(columns.numbers("cut")[order].sum()),
        dropped=columns.counts("reason", lines),
        forms=columns.counts("form", lines),
        tokens=int(lengths.sum()),
        trainable_tokens=int(columns.numbers("trainable")[order].sum()),
        longest=int(lengths.max(initial=0)),
        in_pieces=in_pieces,
        pieces=in_pieces + int((piece > 0).sum()),
    )
    for text, count in columns.counts("unused", lines).items():
        report.count_audit(json.loads(text), (), count)
    for text, count in columns.counts("notes", lines).items():
        report.count_audit({}, json.loads(text), count)
    check_usable(report, [text for _, text in columns.texts("error", lines)], encode.section)
    rows = order[lengths > 0]
    is_chat = columns.table.data.column("chat").is_valid().to_numpy()[rows]
    return ChatSet(
        StoredChats(columns.table.select_columns("chat").select(rows[is_chat])),
        StoredRows(columns.table.select_columns(trained_columns(encode)).select(rows), encode.columns),
        report,
        np.flatnonzero(is_chat).tolist(),
        [tag for _, tag in columns.texts("tag", rows.tolist())],
        stored_end=bool(columns.numbers("ends")[order].any()),
        keys=columns.keys(np.unique(order[(lengths > 0) & (piece == 0)]), near),
    )
