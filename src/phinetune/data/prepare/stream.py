"""Reads and encodes chats during training, for sets that do not fit on the disk."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Features, IterableDataset, List, Value

from phinetune.config.data import DataSection, WeightedFile
from phinetune.data.prepare.encode_rows import BATCH, RowEncoder
from phinetune.data.prepare.first_rows import look_at_first
from phinetune.data.prepare.named_sources import name_sources, weighted
from phinetune.data.read.any_source import scan_rows
from phinetune.data.read.row import Broken, Row
from phinetune.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DRAWN_FROM = 1000  # rows in memory, from which the next one is drawn; a stream is shuffled no further than that
IDS = List(Value("int32"))


def check_stream(section: DataSection) -> None:
    """Make sure that the section asks for nothing that needs all rows at once.

    Raises:
        ConfigError: the section asks for a fraction of held-out rows, for weights, or for a share of the rows.
    """
    problems = []
    if isinstance(section.eval, float):
        problems.append(f"data.eval: {section.eval} of a stream can't be held out; give a file of held-out chats")
    if isinstance(section.train, list) and any(isinstance(entry, WeightedFile) for entry in section.train):
        problems.append("data.train: a stream takes each row once; leave the weights out")
    if section.train_share < 1:
        problems.append("data.train_share: a share is drawn among all rows, and a stream's are not known")
    if problems:
        raise ConfigError([f"{problem} (data.streaming is on)" for problem in problems])


def first_rows(section: DataSection, forms: Sequence[str]) -> list[Row]:
    """The first `BATCH` rows.

    Args:
        forms: the names of the forms of rows that the run takes.

    Raises:
        DataError: a source can't be opened, or one of these rows is broken.
    """
    rows = list(itertools.islice(_rows(section), BATCH))
    look_at_first(name_sources(section.train), rows, section, forms)
    return rows


def tell_unused(source: str, limit: int | None) -> None:
    """Say that a source gives no row, because those before it have as many as `data.limit` allows."""
    logger.warning("%s: no row within data.limit: %s", source, limit)


def stream(encode: RowEncoder) -> IterableDataset:
    """The examples of all rows, shuffled among neighbours by `data.seed`.

    The iterator over the stream raises DataError at the first broken place, and at the first row that can't be used
    unless `invalid_rows` is `drop`.
    """
    columns = {"input_ids": IDS, "labels": IDS, **({"seq_lengths": IDS} if encode.joins else {})}
    features = Features({**columns, **dict.fromkeys(encode.columns, Value("float64"))})
    data: IterableDataset = IterableDataset.from_generator(_encoded, features=features, gen_kwargs={"encode": encode})
    return data.shuffle(seed=encode.section.seed, buffer_size=DRAWN_FROM)


def _encoded(encode: RowEncoder) -> Iterator[dict[str, Any]]:
    for outcome in encode(_rows(encode.section)):
        if outcome.error and encode.section.invalid_rows == "fail":
            raise DataError(
                f"{outcome.row.where}: {outcome.error} (data.invalid_rows: drop leaves such rows out; `phinetune data "
                "check` finds them before training)"
            )
        if outcome.encoded:
            yield outcome.encoded.to_row()


def _rows(section: DataSection) -> Iterator[Row]:
    """The rows within the limit. That a source gives none is told where the limit is reached."""
    taken = 0
    for source, _ in weighted(section.train):
        if taken == section.limit:
            tell_unused(source, section.limit)
            continue
        rest = None if section.limit is None else section.limit - taken
        for row in itertools.islice(_unbroken(source, section), rest):
            taken += 1
            yield row


def _unbroken(source: str, section: DataSection) -> Iterator[Row]:
    """The rows of a source, one after the other.

    Raises:
        DataError: the source has a broken place. It is raised when that place is reached.
    """
    for item in scan_rows(source, section.split, section.name, streaming=True, text_by=section.text_by):
        if isinstance(item, Broken):
            raise DataError(f"{item.where}: {item.problem}")
        yield item
