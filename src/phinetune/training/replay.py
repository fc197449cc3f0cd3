"""Mixes answers that the base itself gives to neutral prompts into the training rows, so that less is forgotten.

The answers are made once for a base, greedily, and kept in the cache of prepared data.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, concatenate_datasets

from phinetune import processes
from phinetune.chats.encoder import ChatEncoder
from phinetune.chats.template import Message
from phinetune.checkpoints.device import pick_device, pick_dtype
from phinetune.checkpoints.load import find_base, load_base
from phinetune.config.model import ModelSection
from phinetune.config.run import RunConfig
from phinetune.data.neutral.neutral_rows import shipped_prompts
from phinetune.data.prepare.arrow_rows import StoredRows
from phinetune.data.prepare.cache import cache_key, cached_folder
from phinetune.data.prepare.chat_sets import Chats, ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.generate import Answer, answer_prompts
from phinetune.errors import ConfigError
from phinetune.training.objectives.objective import Objective

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 128  # most tokens of an answer; of one that is cut there, no end is trained
FILE = "answers.arrow"


@dataclass(frozen=True)
class Replayed:
    """What was mixed in.

    Attributes:
        rows: how many rows.
        prompts: how many different ones; with more rows they come again.
        tokens: of all rows together.
    """

    rows: int
    prompts: int
    tokens: int


def check_replay(config: RunConfig, objective: Objective) -> None:
    """Make sure that answers can be mixed into the rows of a run.

    Raises:
        ConfigError: they can't.
    """
    if not config.data.replay:
        return
    if config.data.streaming:
        raise ConfigError("data.replay: rows can't be mixed into a stream; leave data.streaming out")
    if objective.rows.columns or objective.rows.joins:
        raise ConfigError(f"data.replay: {objective.kind} does not train on single answers; leave data.replay out")


def with_replay(chats: Chats, model: ModelSection, rows: RowEncoder, share: float) -> Chats:
    """The chats with answers of the base mixed into those to train on; as they are without a share.

    Args:
        share: how many rows are mixed in for each row of the data.
    """
    if not share:
        return chats
    count = max(1, round(share * len(chats.train)))
    prompts = shipped_prompts()[:count]
    with processes.main_first():  # the answers are made once
        answered = _answers(model, rows.encoder, prompts)
    examples = replay_examples(rows, answered)
    if not examples:
        logger.warning("data.replay: no answer of the base fits training_config.max_length, so none is mixed in")
        return chats
    taken = list(itertools.islice(itertools.cycle(examples), count))
    told = Replayed(len(taken), min(len(examples), count), sum(len(one.input_ids) for one in taken))
    return replace(chats, train=mixed(chats.train, taken), replay=asdict(told))


def mixed(train: ChatSet, more: Sequence[Encoded]) -> ChatSet:
    """A set with more examples at its end, in memory or on disk."""
    tags = [*train.tags, *([""] * len(more))] if train.tags else train.tags
    if not isinstance(train.encoded, StoredRows):
        where = [*train.where, *(["data.replay"] * len(more))] if train.where else train.where
        return replace(train, encoded=[*train.encoded, *more], tags=tags, where=where)
    data = train.encoded.data
    columns: dict[str, list[Any]] = {
        "input_ids": [one.input_ids for one in more],
        "labels": [one.labels for one in more],
        "length": [len(one.input_ids) for one in more],
    }
    features = Features({name: data.features[name] for name in columns})
    both = concatenate_datasets([data.select_columns(list(columns)), Dataset.from_dict(columns, features=features)])
    return replace(train, encoded=StoredRows(both, train.encoded.columns), tags=tags)


def replay_examples(rows: RowEncoder, answered: Sequence[tuple[str, str, bool]]) -> list[Encoded]:
    """The prompts and their answers as the run's rows, with loss as `data.loss_on` says. Rows that are too long, and
    empty answers, are left out.

    Args:
        answered: prompt, answer, and whether the answer ended by itself.
    """
    told = [one for one in answered if one[1].strip()]
    chats: list[list[Message]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer, _ in told
    ]
    encoder = rows.encoder
    prepared = [encoder.prepare(chat) for chat in chats]
    ended = [
        row if stopped else _without_end(row, len(encoder.prompt_ids(chat[:-1])), encoder)
        for row, chat, (*_, stopped) in zip(encoder.encode(prepared), prepared, told, strict=True)
    ]
    limit = rows.max_length or max((len(one.input_ids) for one in ended), default=0)
    return [one for one in ended if one.trainable and len(one.input_ids) <= limit]


def _without_end(row: Encoded, start: int, encoder: ChatEncoder) -> Encoded:
    """An answer that was cut, without a label on what ends it: the model would learn to stop there.

    Args:
        start: the place of the answer's first token.
    """
    ends = (place for place in range(start, len(row.labels)) if row.input_ids[place] in encoder.end_of_turn)
    kept = next(ends, len(row.labels))
    return row._replace(labels=[*row.labels[:kept], *[IGNORED] * (len(row.labels) - kept)])


def _answers(model: ModelSection, encoder: ChatEncoder, prompts: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Prompts, answers of the base, and whether each ended by itself; from the cache if they are there."""
    settings = {"replay": find_base(model).fingerprint, "prompts": list(prompts), "tokens": ANSWER_TOKENS}
    dtype = pick_dtype(model.dtype, pick_device(model.device))
    settings |= {"quantization": model.quantization, "dtype": str(dtype)}

    def fill(folder: Path) -> None:
        logger.info("data.replay: the base answers %d neutral prompts, once", len(prompts))
        made = _ask(model, encoder, prompts)
        table = pyarrow.table({"answer": [one.text for one in made], "stopped": [one.stopped for one in made]})
        with pyarrow.OSFile(str(folder / FILE), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

    folder = cached_folder(cache_key(settings, encoder.tokenizer), fill)
    with pyarrow.OSFile(str(folder / FILE), "rb") as file, pyarrow.ipc.open_stream(file) as stream:
        kept = stream.read_all().to_pydict()
    return list(zip(prompts, kept["answer"], kept["stopped"], strict=True))


def _ask(model: ModelSection, encoder: ChatEncoder, prompts: Sequence[str]) -> list[Answer]:
    loaded = load_base(model, fast=True)
    ids = [encoder.prompt_ids(encoder.prepare([{"role": "user", "content": prompt}])) for prompt in prompts]
    return answer_prompts(loaded.model.eval(), encoder.tokenizer, ids, max_new_tokens=ANSWER_TOKENS)
