"""Large sets as Arrow files: a line for each row of the source, what became of it, and its ids and labels if kept.

Which rows are trained on, held out, repeated or refused is decided afterwards, over the small columns alone, so one
table serves every split, weight and seed.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, concatenate_datasets

from phinetune.chat.encoder import ChatEncoder, ends_a_turn
from phinetune.config.run import DataSection
from phinetune.data.prepare.encode_rows import RowOutcome, outcomes, tag_of
from phinetune.data.read.rows import Broken, Row
from phinetune.data.read.sources import PIECE, Source, SourcePart, open_source
from phinetune.errors import DataError

logger = logging.getLogger(__name__)

IDS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    {
        "input_ids": IDS,
        "labels": IDS,
        "length": pyarrow.int32(),  # 0 where the row is dropped
        "trainable": pyarrow.int32(),
        "ends": pyarrow.bool_(),  # a label is an end-of-turn token
        "cut": pyarrow.bool_(),
        "form": pyarrow.string(),
        "reason": pyarrow.string(),
        "error": pyarrow.string(),  # with the row's place
        "broken": pyarrow.string(),  # of a place that holds no row
        "tag": pyarrow.string(),
        "chat": pyarrow.string(),  # the messages as JSON, where the row has any
    }
)


def write_table(
    source: str, section: DataSection, encoder: ChatEncoder, max_length: int | None, limit: int | None, folder: Path
) -> None:
    """Encode a source into Arrow files in `folder`, with a process for each core.

    Raises:
        DataError: the source can't be opened, or a process was killed.
    """
    opened = open_source(source, section.split, folder)
    pieces = opened.pieces(limit)
    processes = max(1, min(cores(), len(pieces)))
    logger.info("preparing %s: about %s rows, %d processes", source, f"{len(pieces) * PIECE:,}", processes)
    index = Dataset.from_dict({key: [getattr(piece, key) for piece in pieces] for key in SourcePart._fields})
    try:
        index.with_format("arrow").map(
            encode_pieces,
            batched=True,
            batch_size=1,
            fn_kwargs={"source": opened, "section": section, "encoder": encoder, "max_length": max_length},
            remove_columns=list(SourcePart._fields),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(folder / "rows.arrow"),
            new_fingerprint="0",  # the folder's name says what it holds
        )
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        raise DataError(
            f"{source}: a process that prepared it was killed, most likely for want of memory; close other programs, "
            "or set data.streaming: true"
        ) from error
    for laid_down in folder.glob("source.*"):
        laid_down.unlink()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pieces(
    batch: pyarrow.Table, source: Source, section: DataSection, encoder: ChatEncoder, max_length: int | None
) -> pyarrow.Table:
    """The rows of pieces as lines of the table. Runs in a process of its own."""
    lines: list[dict[str, Any]] = []
    for piece in batch.to_pylist():
        found = list(source.read(SourcePart(**piece)))
        rows = [row for row in found if isinstance(row, Row)]
        made = outcomes(rows, section, encoder, max_length)
        lines += [_broken(row) if isinstance(row, Broken) else _line(next(made), encoder, section.tag) for row in found]
    return pyarrow.Table.from_pylist(lines, schema=SCHEMA)


def _broken(place: Broken) -> dict[str, Any]:
    return {"length": 0, "trainable": 0, "broken": f"{place.where}: {place.problem}"}


def _line(made: RowOutcome, encoder: ChatEncoder, tag: str | None) -> dict[str, Any]:
    row = made.encoded
    return {
        "input_ids": row.input_ids if row else [],
        "labels": row.labels if row else [],
        "length": len(row.input_ids) if row else 0,
        "trainable": row.trainable if row else 0,
        "ends": bool(row) and ends_a_turn(encoder, [row]) if row else False,
        "cut": made.cut,
        "form": made.form,
        "reason": made.reason,
        "error": f"{made.row.where}: {made.error}" if made.error else None,
        "tag": tag_of(made.row, tag) if tag else None,
        "chat": json.dumps(made.chat) if row and made.chat else None,
    }


def read_table(folder: Path) -> Dataset:
    """The table of a source, mapped into memory and not read."""
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("rows*.arrow"))])
