"""A run's chats, read, checked, encoded and split, and a report of what became of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from phinetune.chat.encoder import ChatEncoder, Encoded, ends_a_turn
from phinetune.chat.template import Message
from phinetune.config.run import DataSection, WeightedFile
from phinetune.data.prepare.cache import kept, key_of
from phinetune.data.prepare.encode_rows import RowOutcome, outcomes, tag_of
from phinetune.data.prepare.splits import split_places
from phinetune.data.prepare.stored import TRAINED, Columns, StoredChats, StoredRows
from phinetune.data.prepare.stream import check_stream, first_rows, stream
from phinetune.data.prepare.table import read_table, write_table
from phinetune.data.read.rows import Row, check_source, read_first
from phinetune.data.read.sources import digest
from phinetune.errors import DataError, at_most

SETTINGS = {"split", "format", "loss_on", "system", "overlong", "limit", "tag"}  # on which a table depends
SMALL = 5000  # rows: below, other processes take longer to start than the work takes
REASONS_SHOWN = 4


@dataclass
class Report:
    """What became of the rows of one set. Tokens are those of the kept chats, template included."""

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
        """Add one row."""
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
        """The report in sentences for a person."""
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.most_common())
        dropped = f", {sum(self.dropped.values())} dropped" if self.dropped else ""
        cut = f", {self.cut} cut to fit" if self.cut else ""
        rest = sum(count for _, count in self.dropped.most_common()[REASONS_SHOWN:])
        share = self.trainable_tokens / max(1, self.tokens)
        return [
            f"{self.source}: {self.rows} rows ({forms}): {self.kept} kept{cut}{dropped}; {self.tokens:,} tokens, "
            f"{self.trainable_tokens:,} of them trained on ({share:.0%}); longest chat {self.longest} tokens",
            *(f"  dropped {count}: {reason}" for reason, count in self.dropped.most_common(REASONS_SHOWN)),
            *([f"  dropped {rest} for other reasons"] if rest else []),
        ]


@dataclass
class ChatSet:
    """Chats of one set, as messages and as tokens. Rows that are text or ids have tokens only.

    Attributes:
        places: where in `encoded` each chat stands.
        tags: of each in `encoded`, what its row has in the column `data.tag`; empty without one.
    """

    chats: Sequence[list[Message]]
    encoded: Sequence[Encoded]
    report: Report
    places: Sequence[int] = field(default_factory=list)
    tags: Sequence[str] = field(default_factory=list)
    stored_end: bool = False  # of rows on disk: whether any label is an end-of-turn token
    stream: IterableDataset | None = None  # all rows, where `encoded` is only what a stream began with

    def __len__(self) -> int:
        return len(self.encoded)

    def ends_a_turn(self, encoder: ChatEncoder) -> bool:
        """Whether any label is an end-of-turn token."""
        return self.stored_end if isinstance(self.encoded, StoredRows) else ends_a_turn(encoder, self.encoded)

    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each row, shape (rows)."""
        if isinstance(self.encoded, StoredRows):
            return np.asarray(self.encoded.data.with_format("numpy")["length"][:])
        return np.asarray([len(row.input_ids) for row in self.encoded])

    def dataset(self) -> Dataset | IterableDataset:
        """`input_ids` and `labels`, as the trainer takes them; of rows on disk their `length` too."""
        if self.stream is not None:
            return self.stream
        if isinstance(self.encoded, StoredRows):
            return self.encoded.data
        return Dataset.from_dict(
            {
                "input_ids": [row.input_ids for row in self.encoded],
                "labels": [row.labels for row in self.encoded],
            }
        )


@dataclass
class Chats:
    """A run's training chats and, where there are any, its held-out chats."""

    train: ChatSet
    held_out: ChatSet | None

    def facts(self) -> dict[str, Any]:
        """The reports of both sets, as JSON holds them; `held_out` is None without held-out chats."""
        sets = {"train": self.train, "held_out": self.held_out}
        return {name: made.report.to_dict() if made else None for name, made in sets.items()}


def check_sources(section: DataSection) -> None:
    """Make sure that the files named are there, before anything slow begins.

    Raises:
        DataError: every source that is missing or of an unknown kind.
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


def build_chats(section: DataSection, encoder: ChatEncoder, max_length: int | None) -> Chats:
    """Read and encode what the section names, split as it says.

    Raises:
        DataError: a source is missing, broken or empty; rows can't be used (all listed); no label ends a turn.
    """
    check_sources(section)
    share = section.eval if isinstance(section.eval, float) else None
    name = name_sources(section.train)
    held_out: ChatSet | None = None
    if section.streaming:
        made = _streamed(name, section, encoder, max_length)
    else:
        made, held_out = read_sets(name, section.train, section, encoder, max_length, share=share)
    if not made.ends_a_turn(encoder):
        raise DataError(
            f"{made.report.source}: no label is an end-of-turn token, so the model would never learn to stop; "
            "check data.loss_on and training_config.max_length"
        )
    if section.eval is not None and not isinstance(section.eval, float):
        unlimited = section.model_copy(update={"limit": None})
        held_out = read_sets(name_sources(section.eval), section.eval, unlimited, encoder, max_length)[0]
    return Chats(made, held_out)


def read_sets(
    name: str,
    source: str | Sequence[str | WeightedFile] | None,
    section: DataSection,
    encoder: ChatEncoder,
    max_length: int | None,
    *,
    share: float | None = None,
) -> tuple[ChatSet, ChatSet | None]:
    """The set of one or several sources, and the part of it that is held out, if `share` is one.

    Up to `SMALL` rows are encoded in memory; more by many processes into Arrow files.

    Raises:
        DataError: see `build_chats`.
    """
    sources = weighted(source)
    paths, weights = [path for path, _ in sources], [weight for _, weight in sources]
    read = _read_small(paths, section)
    if read is None:
        counts, make = _prepare_large(paths, section, encoder, max_length)
    else:
        rows = [row for one in read for row in one]
        counts = [len(one) for one in read]

        def make(name: str, places: Sequence[int]) -> ChatSet:
            return build_set(name, [rows[place] for place in places], section, encoder, max_length)

    train, held = split_places(counts, weights, share, section.seed)
    made = make(name, train)
    return made, make(f"{name} (held out)", held) if share is not None else None


def _read_small(paths: Sequence[str], section: DataSection) -> list[list[Row]] | None:
    """The rows of each source, or None where there are more than `SMALL`.

    Raises:
        DataError: what is broken in them, listed.
    """
    most = SMALL + 1 if section.limit is None else min(SMALL + 1, section.limit)
    rows: list[list[Row]] = []
    broken: list[str] = []
    for path in paths:
        found, problems = read_first(path, section.split, most - sum(map(len, rows)))
        rows.append(found)
        broken += problems
    if sum(map(len, rows)) > SMALL:
        return None
    if broken:
        raise DataError(at_most(broken))
    return rows


def build_set(
    name: str, rows: Iterable[Row], section: DataSection, encoder: ChatEncoder, max_length: int | None
) -> ChatSet:
    """Check and encode rows in memory, keeping count of what happened to each.

    Raises:
        DataError: rows that can't be used (unless `invalid_rows` is `drop`), or none that can.
    """
    chats: list[list[Message]] = []
    rows_made: list[Encoded] = []
    places: list[int] = []
    tags: list[str] = []
    report = Report(name)
    problems: list[str] = []
    for outcome in outcomes(rows, section, encoder, max_length):
        report.count(outcome)
        if outcome.error:
            problems.append(f"{outcome.row.where}: {outcome.error}")
        if outcome.encoded:
            rows_made.append(outcome.encoded)
            if section.tag:
                tags.append(tag_of(outcome.row, section.tag))
            if outcome.chat:
                chats.append(outcome.chat)
                places.append(len(rows_made) - 1)
    refuse(report, problems, section)
    return ChatSet(chats, rows_made, report, places, tags)


def refuse(report: Report, problems: Sequence[str], section: DataSection) -> None:
    """Make sure that a set can be trained on.

    Raises:
        DataError: rows that can't be used (unless `invalid_rows` is `drop`), or none that can.
    """
    if problems and section.invalid_rows == "fail":
        raise DataError([*at_most(problems), "(data.invalid_rows: drop leaves such rows out and counts them)"])
    if not report.kept:
        reasons = "; ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise DataError(f"{report.source}: no chat to use: " + (reasons or "the set is empty"))


def _prepare_large(
    paths: Sequence[str], section: DataSection, encoder: ChatEncoder, max_length: int | None
) -> tuple[list[int], Callable[[str, Sequence[int]], ChatSet]]:
    """Rows of each source and what makes a set of the rows at given places."""
    tables = [_kept_table(path, section, encoder, max_length) for path in paths]
    counts = [len(table) for table in tables]
    if section.limit is not None:
        ends = [min(end, section.limit) for end in itertools.accumulate(counts)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    columns = Columns(concatenate_datasets(tables))

    def make(name: str, places: Sequence[int]) -> ChatSet:
        return _stored_set(name, columns, places, section)

    return counts, make


def _kept_table(path: str, section: DataSection, encoder: ChatEncoder, max_length: int | None) -> Dataset:
    """The table of a source, made now unless it is kept from before.

    Raises:
        DataError: it has broken places, or rows that can't be used where these are refused; it is not kept then.
    """
    settings = section.model_dump(mode="json", include=SETTINGS)
    key = key_of({**settings, "max_length": max_length, "source": digest(path, section.split)}, encoder.tokenizer)

    def make(folder: Path) -> None:
        write_table(path, section, encoder, max_length, section.limit, folder)
        columns = Columns(read_table(folder))
        everywhere = range(len(columns.table))
        broken = [text for _, text in columns.texts("broken", everywhere)]
        if broken:
            raise DataError(at_most(broken))
        if section.limit is None:  # a row behind the limit is nobody's
            problems = [text for _, text in columns.texts("error", everywhere)]
            refuse(Report(path, kept=1), problems, section)

    return read_table(kept(key, make))


def _streamed(name: str, section: DataSection, encoder: ChatEncoder, max_length: int | None) -> ChatSet:
    """A stream, told by its first rows.

    Raises:
        DataError: these can't be used, or none of them.
    """
    rows = first_rows(section)
    made = build_set(f"{name} (streamed; its first {len(rows)} rows)", rows, section, encoder, max_length)
    made.stream = stream(section, encoder, max_length)
    return made


def _stored_set(name: str, columns: Columns, places: Sequence[int], section: DataSection) -> ChatSet:
    """The rows of a table at `places`, a row as often as it stands there."""
    order = np.asarray(places, dtype=np.int64)
    lengths = columns.numbers("length")[order]
    report = Report(
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
    refuse(report, [text for _, text in columns.texts("error", places)], section)
    rows = order[lengths > 0]
    is_chat = columns.table.data.column("chat").is_valid().to_numpy()[rows]
    return ChatSet(
        StoredChats(columns.table.select_columns("chat").select(rows[is_chat])),
        StoredRows(columns.table.select_columns(TRAINED).select(rows)),
        report,
        np.flatnonzero(is_chat).tolist(),
        [tag for _, tag in columns.texts("tag", rows.tolist())],
        bool(columns.numbers("ends")[order].any()),
    )


def weighted(source: str | Sequence[str | WeightedFile] | None) -> list[tuple[str, float]]:
    """Each source and its weight, 1 where none is given."""
    listed = [source] if isinstance(source, str) else list(source or [])
    return [(one, 1.0) if isinstance(one, str) else (one.path, one.weight) for one in listed]


def name_sources(source: str | Sequence[str | WeightedFile] | None) -> str:
    """The sources in a line: `a.jsonl, b.jsonl × 2`."""
    return ", ".join(path if weight == 1 else f"{path} × {weight:g}" for path, weight in weighted(source))
