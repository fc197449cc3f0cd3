"""Writes large sets as tables in Arrow files.

A table has one line for each row of the source: what became of the row and, if it is kept, its token ids and labels.
A text that was cut into pieces has a line for each piece.
Which rows are trained on, held out, repeated or refused is decided later, from the small columns alone. So one table
serves every split, weight and seed.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, concatenate_datasets

from phinetune.chats.encoder import ends_a_turn
from phinetune.data.prepare.copies import compared_text, key_of
from phinetune.data.prepare.duplicates import hashes_of
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome, tag_of
from phinetune.data.prepare.workers import end_with, ending_with_us
from phinetune.data.read.row import Broken, Row
from phinetune.data.read.source_parts import PIECE, Source, SourcePart, open_source
from phinetune.errors import DataError

logger = logging.getLogger(__name__)

IDS = pyarrow.list_(pyarrow.int32())
FIELDS = {
    "input_ids": IDS,
    "labels": IDS,
    "seq_lengths": IDS,  # tokens of each conversation, if the example holds several
    "length": pyarrow.int32(),  # tokens; 0 if the row is dropped
    "trainable": pyarrow.int32(),
    "ends": pyarrow.bool_(),  # whether any label is an end-of-turn token
    "cut": pyarrow.bool_(),
    "form": pyarrow.string(),
    "reason": pyarrow.string(),
    "error": pyarrow.string(),  # begins with the row's place
    "broken": pyarrow.string(),  # for a place that holds no row: what is wrong there
    "tag": pyarrow.string(),
    "group": pyarrow.string(),
    "chat": pyarrow.string(),  # the messages as JSON, if the row is a chat
    "key": pyarrow.binary(),  # what the row is compared by as a whole, and
    "asked": pyarrow.binary(),  # by the turns before its first answer
    "shingles": pyarrow.list_(pyarrow.uint32()),  # and what near copies of it are found by
    "piece": pyarrow.int32(),  # which piece of its row it is, from 0
    "unused": pyarrow.string(),  # what of the row reaches no model, as JSON
    "notes": pyarrow.string(),  # what storage may have changed, as JSON
}


def schema(encode: RowEncoder) -> pyarrow.Schema:
    """The columns of a table: `FIELDS`, and the numbers that an example has besides its tokens."""
    return pyarrow.schema({**FIELDS, **dict.fromkeys(encode.columns, pyarrow.float64())})


def write_table(source: str, encode: RowEncoder, folder: Path) -> None:
    """Encode a source into Arrow files in `folder`, with up to one process for each core.

    Raises:
        DataError: the source can't be opened, or a process was killed.
    """
    section = encode.section
    opened = open_source(source, section.split, folder, section.name, section.text_by)
    pieces = opened.pieces(section.limit)
    processes = max(1, min(cores(), len(pieces)))
    logger.info("preparing %s: about %s rows, %d processes", source, f"{len(pieces) * PIECE:,}", processes)
    index = Dataset.from_dict({key: [getattr(piece, key) for piece in pieces] for key in SourcePart._fields})
    try:
        with ending_with_us():
            index.with_format("arrow").map(
                encode_pieces,
                batched=True,
                batch_size=1,
                fn_kwargs={"source": opened, "encode": encode, "starter": os.getpid()},
                remove_columns=list(SourcePart._fields),
                num_proc=processes if processes > 1 else None,
                cache_file_name=str(folder / "rows.arrow"),
                new_fingerprint="0",  # `datasets` needs none: the name of the cache's folder identifies the table
            )
    except RuntimeError as error:
        if "subprocesses" not in str(error):
            raise
        raise DataError(
            f"{source}: a process that prepared it was killed, most likely because memory ran out; close other "
            "programs, or set data.streaming: true"
        ) from error
    for copy in folder.glob("source.*"):
        copy.unlink()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_pieces(batch: pyarrow.Table, source: Source, encode: RowEncoder, starter: int) -> pyarrow.Table:
    """The rows of some pieces as lines of the table. Runs in a process of its own, which ends with its starter.

    Args:
        batch: the pieces, with the fields of `SourcePart` as columns.
        starter: the number of the process that started this one, or of this one.
    """
    if starter != os.getpid():
        end_with(starter)
    lines: list[dict[str, Any]] = []
    for piece in batch.to_pylist():
        items = list(source.read(SourcePart(**piece)))
        outcomes = encode([item for item in items if isinstance(item, Row)])
        for item in items:
            if isinstance(item, Broken):
                lines.append(_broken(item))
                continue
            outcome = next(outcomes)
            lines += [_line(one, encode) for one in (outcome, *itertools.islice(outcomes, outcome.pieces - 1))]
    return pyarrow.Table.from_pylist(lines, schema=schema(encode))


def _broken(place: Broken) -> dict[str, Any]:
    return {"length": 0, "trainable": 0, "piece": 0, "broken": f"{place.where}: {place.problem}"}


def _line(outcome: RowOutcome, encode: RowEncoder) -> dict[str, Any]:
    example, tag = outcome.encoded, encode.section.tag
    key, asked = key_of(outcome) if outcome.piece == 0 else (None, None)
    return {
        "input_ids": example.input_ids if example else [],
        "labels": example.labels if example else [],
        "seq_lengths": list(example.lengths) if example else [],
        "length": len(example.input_ids) if example else 0,
        "trainable": example.trainable if example else 0,
        "ends": bool(example) and ends_a_turn(encode.encoder, [example]) if example else False,
        "cut": outcome.cut,
        "form": outcome.form,
        "reason": outcome.reason,
        "error": f"{outcome.row.where}: {outcome.error}" if outcome.error else None,
        "tag": tag_of(outcome.row, tag) if tag else None,
        "group": tag_of(outcome.row, group) or None if (group := encode.section.group) else None,
        "chat": json.dumps(outcome.chat) if example and outcome.chat else None,
        "key": key,
        "asked": asked,
        "shingles": hashes_of(compared_text(outcome)) if outcome.piece == 0 else None,
        "piece": outcome.piece,
        "unused": json.dumps(outcome.audit.unused) if outcome.audit.unused else None,
        "notes": json.dumps(sorted(outcome.audit.notes)) if outcome.audit.notes else None,
        **((example.values if example else None) or {}),
    }


def read_table(folder: Path) -> Dataset:
    """The table in a folder. Its files are mapped into memory, so nothing is read yet."""
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("rows*.arrow"))])
