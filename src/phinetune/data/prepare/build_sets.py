"""Reads, checks, encodes and splits a run's chats, and reports what became of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from datasets import Dataset, concatenate_datasets

from phinetune.config.data import DataSection, WeightedFile
from phinetune.data.prepare.arrow_rows import Columns
from phinetune.data.prepare.arrow_table import read_table, write_table
from phinetune.data.prepare.cache import cache_key, cached_folder
from phinetune.data.prepare.chat_sets import Chats, ChatSet
from phinetune.data.prepare.collect_sets import check_usable, collect_set, stored_set
from phinetune.data.prepare.copies import Marks, SetKeys, count_shared, groups_of, keys_of
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome
from phinetune.data.prepare.first_rows import look_at_first
from phinetune.data.prepare.named_sources import name_sources, weighted
from phinetune.data.prepare.near_copies import near_between, with_near
from phinetune.data.prepare.report import DataReport
from phinetune.data.prepare.sources import check_sources, held_out_section, name_held_out, name_test, test_section
from phinetune.data.prepare.splits import held_out_places, shared_places, split_places
from phinetune.data.prepare.stream import first_rows, stream, tell_unused
from phinetune.data.read.any_source import read_first, scan_rows
from phinetune.data.read.row import Row
from phinetune.data.read.source_parts import digest
from phinetune.errors import DataError, at_most

logger = logging.getLogger(__name__)

# The keys that a table depends on.
SETTINGS = {
    *("split", "name", "format", "loss_on", "system", "overlong", "overlap", "limit", "tag", "text_by"),
    *("columns", "prompt", "completion", "system_text", "row", "response", "instruction", "group"),
}
OVERLAP = DataSection.model_fields["overlap"].default
SMALL = 5000  # rows; for fewer, starting other processes takes longer than the work


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
        train, held_out = read_sets(name, section.train, encode, share=share, train_share=section.train_share)
    if not train.ends_a_turn(encode.encoder):
        raise DataError(
            f"{train.report.source}: no label is an end-of-turn token, so the model would never learn to stop; "
            "check data.loss_on and training_config.max_length"
        )
    others = held_out_section(section)
    if others:
        held_out = read_sets(name_held_out(section), others.train, replace(encode, section=others))[0]
    last = test_section(section)
    test = read_sets(name_test(section), last.train, replace(encode, section=last))[0] if last else None
    for measured in filter(None, (held_out, test)):
        compare_sets(train, measured)
    check_group(section, [one for one in (train, held_out, test) if one])
    chats = Chats(train, held_out, test)
    _tell_without_effect(chats, encode)
    return chats


def check_group(section: DataSection, sets: Sequence[ChatSet]) -> None:
    """Make sure that rows have the column that they are to be grouped by.

    Raises:
        DataError: none has it.
    """
    if section.group and not section.streaming and not any(one.keys and any(one.keys.group or ()) for one in sets):
        named = sets[0].report.source
        raise DataError(f"data.group {section.group}: no row of {named} has a column of that name{_columns(section)}")


def _tell_without_effect(chats: Chats, encode: RowEncoder) -> None:
    """Say which keys change nothing, because no row has what they are for."""
    section, measured = encode.section, chats.measured or chats.train
    if section.group and section.streaming:
        logger.warning("data.group has no effect: the rows are a stream, so the held-out ones come from their own file")
    if section.tag and not any(measured.tags):
        logger.warning(
            "data.tag %s: no row of %s has a column of that name%s",
            section.tag,
            measured.report.source,
            _columns(test_section(section) or held_out_section(section) or section),
        )
    sets = [one for one in (chats.train, chats.held_out, chats.test) if one]
    if section.response and not any(one.report.forms.get("text") for one in sets):
        logger.warning("data.response has no effect: no row is a text; chats have their answers by the template")
    if section.overlap != OVERLAP and not section.streaming and not any(one.report.pieces for one in sets):
        longer = f"no text was longer than {encode.max_length} tokens"
        reason = longer if section.overlong == "cut" and encode.max_length else "no text was cut into pieces"
        logger.warning("data.overlap has no effect: %s", reason)


def _columns(section: DataSection) -> str:
    """The columns of a section's first row, as the end of a sentence."""
    items = scan_rows(
        *(weighted(section.train)[0][0], section.split, section.name),
        streaming=section.streaming,
        text_by=section.text_by,
    )
    row = next((item for item in items if isinstance(item, Row)), None)
    return f"; there are the columns {', '.join(row.fields)}" if row else ""


def compare_sets(train: ChatSet, held_out: ChatSet) -> None:
    """Count how many held-out rows are trained on, if the rows of both sets are known; of a stream its first rows."""
    if train.keys and held_out.keys:
        looked = train.keys.near is not None and held_out.keys.near is not None  # they are one set, split by fraction
        keys = (train.keys, held_out.keys) if looked else near_between(train.keys, held_out.keys)
        held_out.shared = count_shared(*keys)
        if train.stream is not None:
            held_out.not_compared = (
                f"the held-out chats were compared with the first {train.report.rows:,} training rows only, because "
                "the rest of a stream (data.streaming) is not read before training"
            )


def read_few(encode: RowEncoder) -> ChatSet | None:
    """The training set of a section, of a stream its first rows. None if it has more than `SMALL` rows, which takes
    long.

    Raises:
        DataError: see `build_chats`.
    """
    section = encode.section
    if section.streaming:
        return _streamed_set(name_sources(section.train), encode)
    if _read_small([path for path, _ in weighted(section.train)], encode) is None:
        return None
    share = section.eval if isinstance(section.eval, float) else None
    name, part = name_sources(section.train), section.train_share
    return read_sets(name, section.train, encode, share=share, train_share=part)[0]


def read_sets(
    name: str,
    source: str | Sequence[str | WeightedFile] | None,
    encode: RowEncoder,
    *,
    share: float | None = None,
    train_share: float = 1.0,
) -> tuple[ChatSet, ChatSet | None]:
    """The set of one or several sources, and the set of the rows that are held out of them.

    Up to `SMALL` rows are encoded in memory. More are encoded by several processes into Arrow files.

    Args:
        name: of the set, for its report.
        share: the fraction of the rows to hold out. None: no rows are held out, and the second set is None.
        train_share: how large a share of the others is trained on.

    Raises:
        DataError: see `build_chats`.
    """
    sources = weighted(source)
    paths, weights = [path for path, _ in sources], [weight for _, weight in sources]
    rows_by_source = _read_small(paths, encode)
    source_rows = _prepare_large(paths, encode) if rows_by_source is None else _prepare_small(rows_by_source, encode)
    counts, seed = source_rows.counts, encode.section.seed
    for path, before in zip(paths, [0, *itertools.accumulate(counts)], strict=False):
        if before == encode.section.limit:
            tell_unused(path, before)
    keys = source_rows.keys() if share is not None or train_share < 1 else None
    named = (keys.group if keys else None) or ()
    if share is None:
        places = split_places(counts, weights, set(), seed)[0]
        return source_rows.make_set(name, _share_of(places, train_share, seed, named)), None
    assert keys
    keys = with_near(keys)
    held_out = held_out_places(sum(counts), share, seed, groups_of(keys))
    train, held = split_places(counts, weights, held_out, seed)
    train = _share_of(train, train_share, seed, named)
    return source_rows.make_set(name, train, keys), source_rows.make_set(f"{name} (held out)", held, keys)


def _share_of(places: list[int], share: float, seed: int, groups: Marks) -> list[int]:
    return places if share == 1 else shared_places(places, share, seed, groups)


class _MakeSet(Protocol):
    def __call__(self, name: str, places: Sequence[int], keys: SetKeys | None = None) -> ChatSet:
        """The set of the rows at some places. `keys`: of all rows, if they are there already."""


@dataclass(frozen=True)
class _SourceRows:
    """All rows of the sources of a set.

    Attributes:
        counts: how many rows each source has.
        keys: makes what all rows are compared by.
        make_set: makes a set of some of the rows.
    """

    counts: Sequence[int]
    keys: Callable[[], SetKeys]
    make_set: _MakeSet


def _prepare_small(rows_by_source: Sequence[Sequence[Row]], encode: RowEncoder) -> _SourceRows:
    rows: list[list[RowOutcome]] = []
    for outcome in encode(itertools.chain.from_iterable(rows_by_source)):
        if outcome.piece == 0:
            rows.append([])
        rows[-1].append(outcome)

    def make_set(name: str, places: Sequence[int], keys: SetKeys | None = None) -> ChatSet:
        made = collect_set(name, itertools.chain.from_iterable(rows[place] for place in places), encode)
        kept = [place for place in dict.fromkeys(places) if rows[place][0].encoded]
        made.keys = keys.at(kept) if keys else keys_of([rows[place][0] for place in kept], encode.section.group)
        return made

    return _SourceRows(
        [len(own) for own in rows_by_source], lambda: keys_of([row[0] for row in rows], encode.section.group), make_set
    )


def _read_small(paths: Sequence[str], encode: RowEncoder) -> list[list[Row]] | None:
    """The rows of each source, or None if there are more than `SMALL` together.

    Raises:
        DataError: places are broken; the error lists them.
    """
    section = encode.section
    most = SMALL + 1 if section.limit is None else min(SMALL + 1, section.limit)
    rows: list[list[Row]] = []
    broken: list[str] = []
    for path in paths:
        left = most - sum(map(len, rows))
        own, problems = read_first(path, section.split, left, section.name, section.text_by)
        look_at_first(path, own, section, encode.forms)
        rows.append(own)
        broken += problems
    if sum(map(len, rows)) > SMALL:
        return None
    if broken:
        raise DataError(at_most(broken))
    return rows


def _prepare_large(paths: Sequence[str], encode: RowEncoder) -> _SourceRows:
    section = encode.section
    tables = [_cached_table(path, encode) for path in paths]
    counts = [len(Columns(table).first_lines()) for table in tables]
    if section.limit is not None:
        ends = [min(end, section.limit) for end in itertools.accumulate(counts)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    columns = Columns(concatenate_datasets(tables))

    def all_keys() -> SetKeys:
        return columns.keys(columns.first_lines()[: sum(counts)])

    def make_set(name: str, places: Sequence[int], keys: SetKeys | None = None) -> ChatSet:
        return stored_set(name, columns, places, encode, keys.near if keys else None)

    return _SourceRows(counts, all_keys, make_set)


def _cached_table(path: str, encode: RowEncoder) -> Dataset:
    """The table of a source. It is made now if the cache does not hold it.

    Raises:
        DataError: the source has broken places, or rows that can't be used and `invalid_rows` is `fail`. Then the table
            does not go into the cache.
    """
    section = encode.section
    settings = {**section.model_dump(mode="json", include=SETTINGS), **encode.identity()}
    settings |= {"max_length": encode.max_length, "source": digest(path, section.split, section.name)}
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
    rows = first_rows(encode.section, encode.forms)
    outcomes = list(encode(rows))
    chat_set = collect_set(f"{name} (streamed; its first {len(rows)} rows)", outcomes, encode)
    chat_set.keys = keys_of([outcome for outcome in outcomes if outcome.piece == 0 and outcome.encoded])
    chat_set.stream, chat_set.where = stream(encode), []
    return chat_set
