"""Reads, checks, encodes and splits a run's chats, and reports what became of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from phinetune.chats.template import Message
from phinetune.config.data import DataSection, WeightedFile
from phinetune.data.prepare.arrow_rows import Columns, StoredChats, StoredRows, trained_columns
from phinetune.data.prepare.arrow_table import read_table, write_table
from phinetune.data.prepare.cache import cache_key, cached_folder
from phinetune.data.prepare.chat_sets import Chats, ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder, tag_of
from phinetune.data.prepare.report import DataReport
from phinetune.data.prepare.splits import split_places
from phinetune.data.prepare.stream import check_stream, first_rows, stream
from phinetune.data.read.any_source import check_source, read_first
from phinetune.data.read.row import Row
from phinetune.data.read.source_parts import digest
from phinetune.engine.examples import Encoded
from phinetune.errors import DataError, at_most

SETTINGS = {"split", "format", "loss_on", "system", "overlong", "limit", "tag"}  # keys that a table depends on
SMALL = 5000  # rows; for fewer, starting other processes takes longer than the work


def check_sources(section: DataSection) -> None:
    """Make sure that the sources exist, before anything slow begins.

    Raises:
        DataError: no training file is given, or sources are missing or of an unknown kind; the error lists all of them.
        ConfigError: the section asks for a stream and for something that a stream can't give.
    """
    if section.train is None:
        raise DataError("data.train: no file given; set it to a file of chats")
    if section.streaming:
        check_stream(section)
    problems = []
    for source in (section.train, section.eval):
        if not isinstance(source, float) and source is not None:
            problems += [problem for one, _ in weighted(source) if (problem := check_source(one))]
    if problems:
        raise DataError(problems)


def build_chats(encode: RowEncoder) -> Chats:
    """Read, encode and split the sources that the section of `encode` names.

    Raises:
        DataError: a source is missing, broken or empty; rows can't be used (the error lists them); a split would be
            empty; or no label is an end-of-turn token.
        ConfigError: see `check_sources`.
    """
    section = encode.section
    check_sources(section)
    share = section.eval if isinstance(section.eval, float) else None
    name = name_sources(section.train)
    held_out: ChatSet | None = None
    if section.streaming:
        train = _streamed_set(name, encode)
    else:
        train, held_out = read_sets(name, section.train, encode, share=share)
    if not train.ends_a_turn(encode.encoder):
        raise DataError(
            f"{train.report.source}: no label is an end-of-turn token, so the model would never learn to stop; "
            "check data.loss_on and training_config.max_length"
        )
    if section.eval is not None and not isinstance(section.eval, float):
        held_out = read_sets(name_sources(section.eval), section.eval, encode.with_section(limit=None))[0]
    return Chats(train, held_out)


def read_sets(
    name: str,
    source: str | Sequence[str | WeightedFile] | None,
    encode: RowEncoder,
    *,
    share: float | None = None,
) -> tuple[ChatSet, ChatSet | None]:
    """The set of one or several sources, and the set of the rows that are held out of them.

    Up to `SMALL` rows are encoded in memory. More are encoded by several processes into Arrow files.

    Args:
        name: of the set, for its report.
        share: the fraction of the rows to hold out. None: no rows are held out, and the second set is None.

    Raises:
        DataError: see `build_chats`.
    """
    sources = weighted(source)
    paths, weights = [path for path, _ in sources], [weight for _, weight in sources]
    rows_by_source = _read_small(paths, encode.section)
    if rows_by_source is None:
        counts, make_set = _prepare_large(paths, encode)
    else:
        rows = list(itertools.chain.from_iterable(rows_by_source))
        counts = [len(own) for own in rows_by_source]

        def make_set(name: str, places: Sequence[int]) -> ChatSet:
            return build_set(name, [rows[place] for place in places], encode)

    train, held_out = split_places(counts, weights, share, encode.section.seed)
    train_set = make_set(name, train)
    return train_set, make_set(f"{name} (held out)", held_out) if share is not None else None


def _read_small(paths: Sequence[str], section: DataSection) -> list[list[Row]] | None:
    """The rows of each source, or None if there are more than `SMALL` together.

    Raises:
        DataError: places are broken; the error lists them.
    """
    most = SMALL + 1 if section.limit is None else min(SMALL + 1, section.limit)
    rows: list[list[Row]] = []
    broken: list[str] = []
    for path in paths:
        own, problems = read_first(path, section.split, most - sum(map(len, rows)))
        rows.append(own)
        broken += problems
    if sum(map(len, rows)) > SMALL:
        return None
    if broken:
        raise DataError(at_most(broken))
    return rows


def build_set(name: str, rows: Iterable[Row], encode: RowEncoder) -> ChatSet:
    """Check and encode rows in memory, and count what becomes of them.

    Args:
        name: of the set, for its report.

    Raises:
        DataError: rows can't be used (unless `invalid_rows` is `drop`), or no row can.
    """
    chats: list[list[Message]] = []
    examples: list[Encoded] = []
    places: list[int] = []
    tags: list[str] = []
    report = DataReport(name)
    problems: list[str] = []
    tag = encode.section.tag
    for outcome in encode(rows):
        report.count(outcome)
        if outcome.error:
            problems.append(f"{outcome.row.where}: {outcome.error}")
        if outcome.encoded:
            examples.append(outcome.encoded)
            if tag:
                tags.append(tag_of(outcome.row, tag))
            if outcome.chat:
                chats.append(outcome.chat)
                places.append(len(examples) - 1)
    check_usable(report, problems, encode.section)
    return ChatSet(chats, examples, report, places, tags)


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


def _prepare_large(
    paths: Sequence[str], encode: RowEncoder
) -> tuple[list[int], Callable[[str, Sequence[int]], ChatSet]]:
    """How many rows each source has, and a function that makes a set of the rows at some places."""
    section = encode.section
    tables = [_cached_table(path, encode) for path in paths]
    counts = [len(table) for table in tables]
    if section.limit is not None:
        ends = [min(end, section.limit) for end in itertools.accumulate(counts)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    columns = Columns(concatenate_datasets(tables))

    def make_set(name: str, places: Sequence[int]) -> ChatSet:
        return _stored_set(name, columns, places, encode)

    return counts, make_set


def _cached_table(path: str, encode: RowEncoder) -> Dataset:
    """The table of a source. It is made now if the cache does not hold it.

    Raises:
        DataError: the source has broken places, or rows that can't be used and `invalid_rows` is `fail`. Then the table
            does not go into the cache.
    """
    section = encode.section
    settings = {**section.model_dump(mode="json", include=SETTINGS), **encode.identity()}
    settings |= {"max_length": encode.max_length, "source": digest(path, section.split)}
    key = cache_key(settings, encode.encoder.tokenizer)

    def fill(folder: Path) -> None:
        write_table(path, encode, folder)
        columns = Columns(read_table(folder))
        everywhere = range(len(columns.table))
        broken = [text for _, text in columns.texts("broken", everywhere)]
        if broken:
            raise DataError(at_most(broken))
        if section.limit is None:  # with a limit, the table may hold rows behind it, which are not used
            problems = [text for _, text in columns.texts("error", everywhere)]
            check_usable(DataReport(path, kept=1), problems, section)

    return read_table(cached_folder(key, fill))


def _streamed_set(name: str, encode: RowEncoder) -> ChatSet:
    """The set of a stream. Its report and its examples are those of the first rows.

    Raises:
        DataError: some of the first rows can't be used (unless `invalid_rows` is `drop`), or none can.
    """
    rows = first_rows(encode.section)
    chat_set = build_set(f"{name} (streamed; its first {len(rows)} rows)", rows, encode)
    chat_set.stream = stream(encode)
    return chat_set


def _stored_set(name: str, columns: Columns, places: Sequence[int], encode: RowEncoder) -> ChatSet:
    """The set of a table's rows at `places`. A place may stand there several times."""
    order = np.asarray(places, dtype=np.int64)
    lengths = columns.numbers("length")[order]
    report = DataReport(
        name,
        rows=len(places),
        kept=int((lengths > 0).sum()),
        cut=int(columns.numbers("cut")[order].sum()),
        dropped=columns.counts("reason", places),
        forms=columns.counts("form", places),
        tokens=int(lengths.sum()),
        trainable_tokens=int(columns.numbers("trainable")[order].sum()),
        longest=int(lengths.max(initial=0)),
    )
    check_usable(report, [text for _, text in columns.texts("error", places)], encode.section)
    rows = order[lengths > 0]
    is_chat = columns.table.data.column("chat").is_valid().to_numpy()[rows]
    return ChatSet(
        StoredChats(columns.table.select_columns("chat").select(rows[is_chat])),
        StoredRows(columns.table.select_columns(trained_columns(encode)).select(rows), encode.columns),
        report,
        np.flatnonzero(is_chat).tolist(),
        [tag for _, tag in columns.texts("tag", rows.tolist())],
        bool(columns.numbers("ends")[order].any()),
    )


def weighted(source: str | Sequence[str | WeightedFile] | None) -> list[tuple[str, float]]:
    """Each source and its weight, which is 1 if none is given."""
    entries = [source] if isinstance(source, str) else list(source or [])
    return [(entry, 1.0) if isinstance(entry, str) else (entry.path, entry.weight) for entry in entries]


def name_sources(source: str | Sequence[str | WeightedFile] | None) -> str:
    """The sources in one line, for example `a.jsonl, b.jsonl × 2`."""
    return ", ".join(path if weight == 1 else f"{path} × {weight:g}" for path, weight in weighted(source))
