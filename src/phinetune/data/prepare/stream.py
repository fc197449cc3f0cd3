"""Chats read and encoded while training goes on: for sets that the disk has no room for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, List, Value

from phinetune.chat.encoder import ChatEncoder, Encoded
from phinetune.config.run import DataSection, WeightedFile
from phinetune.data.prepare.encode_rows import BATCH, outcomes
from phinetune.data.read.rows import Broken, Row, number_rows, open_dataset, scan_rows
from phinetune.errors import ConfigError, DataError

DRAWN_FROM = 1000  # rows held, of which the next is drawn: the order of a stream is its file's but for that
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def check_stream(section: DataSection) -> None:
    """Make sure that the section asks for nothing that takes all rows at once.

    Raises:
        ConfigError: it does.
    """
    problems = []
    if isinstance(section.eval, float):
        problems.append(f"data.eval: {section.eval} of a stream can't be held out; give a file of held-out chats")
    if isinstance(section.train, list) and any(isinstance(one, WeightedFile) for one in section.train):
        problems.append("data.train: a stream takes each row once; leave the weights out")
    if problems:
        raise ConfigError([f"{problem} (data.streaming is on)" for problem in problems])


def first_rows(section: DataSection) -> list[Row]:
    """As many rows as are read and encoded together.

    Raises:
        DataError: a source can't be opened, or is broken there.
    """
    return list(itertools.islice(_rows(section), BATCH))


def stream(section: DataSection, encoder: ChatEncoder, max_length: int | None) -> IterableDataset:
    """`input_ids` and `labels` of the rows as they come, in an order that `data.seed` draws among neighbours.

    Going over it raises DataError at the first row that can't be used, unless `invalid_rows` is `drop`.
    """
    given = {"section": section, "encoder": encoder, "max_length": max_length}
    made: IterableDataset = IterableDataset.from_generator(_encoded, features=FEATURES, gen_kwargs=given)
    return made.shuffle(seed=section.seed, buffer_size=DRAWN_FROM)


def _encoded(section: DataSection, encoder: ChatEncoder, max_length: int | None) -> Iterator[dict[str, list[int]]]:
    for made in outcomes(_rows(section), section, encoder, max_length):
        if made.error and section.invalid_rows == "fail":
            raise DataError(
                f"{made.row.where}: {made.error} (data.invalid_rows: drop leaves such rows out; `phinetune data check` "
                "finds them before training)"
            )
        if made.encoded:
            yield Encoded._asdict(made.encoded)


def _rows(section: DataSection) -> Iterator[Row]:
    sources = [section.train] if isinstance(section.train, str) else section.train or []
    return itertools.islice(
        itertools.chain.from_iterable(_sound(str(source), section.split) for source in sources), section.limit
    )


def _sound(source: str, split: str) -> Iterator[Row]:
    """The rows of a source one after the other.

    Raises:
        DataError: at the first broken place.
    """
    for found in _scan(source, split):
        if isinstance(found, Broken):
            raise DataError(f"{found.where}: {found.problem}")
        yield found


def _scan(source: str, split: str) -> Any:
    if Path(source).expanduser().is_file():
        return scan_rows(source, split)
    return number_rows(source, open_dataset(source, split, streaming=True))
