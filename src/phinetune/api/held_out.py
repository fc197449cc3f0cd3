"""The held-out chats of a run, or of any file, encoded as the run's own were; no weight is needed for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.checkpoints.opened import run_of
from phinetune.checkpoints.tokenizer import open_config, open_tokenizer
from phinetune.config.data import DataSection
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build_sets import build_chats, compare_sets, read_few, read_sets
from phinetune.data.prepare.chat_sets import Chats, ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.sources import check_sources, held_out_section, name_held_out, name_sources, weighted
from phinetune.errors import DataError
from phinetune.training.limits import limit_length
from phinetune.training.objectives.registry import make_objective
from phinetune.training.prepare import SettledRun
from phinetune.training.settings import read_settings

logger = logging.getLogger(__name__)

# Of a set's report: what differs when the files have changed.
COMPARED = ("rows", "kept", "tokens", "trainable_tokens")


def row_encoder(config: RunConfig) -> RowEncoder:
    """How rows become examples by a configuration.

    Raises:
        PhinetuneError: an unknown key, or no tokenizer there.
    """
    settings = limit_length(read_settings(config.peft_config, config.training_config), open_config(config.model))
    settled = SettledRun(config, settings, make_objective(config.objective))
    return settled.row_encoder(open_tokenizer(config.model))


def chats_of(config: RunConfig, source: str | Sequence[str]) -> ChatSet:
    """The chats of a file, or of several, encoded as the run's own were, and compared with those it trained on.

    Raises:
        DataError: a file is missing, or its rows can't be used.
    """
    listed = source if isinstance(source, str) else list(source)
    section = config.data.model_copy(update={"train": listed, "eval": None, "limit": None})
    return _read(config, name_sources(listed), section)


def _read(config: RunConfig, name: str, section: DataSection) -> ChatSet:
    check_sources(section)
    encode = row_encoder(config)
    held_out = read_sets(name, section.train, replace(encode, section=section))[0]
    _compare_with_training(encode, held_out)
    return held_out


def _compare_with_training(encode: RowEncoder, held_out: ChatSet) -> None:
    """Count the rows that the run trained on, if its training rows are few and on this disk."""
    section = encode.section
    places = [Path(path).expanduser() for path, _ in weighted(section.train)]
    if section.streaming or not places or not all(place.exists() for place in places):
        return
    try:
        train = read_few(encode)
    except DataError as error:
        logger.warning("the run's training rows can't be read, so these chats are not compared with them: %s", error)
        return
    if train:
        compare_sets(train, held_out)


def held_out_chats(config: RunConfig, path: Path) -> ChatSet | None:
    """The run's own held-out chats: a file's, or the share of its training chats; None where it has none.

    Raises:
        DataError: a file is missing or unusable, or has changed so that the share would be another one.
    """
    if config.data.eval is None:
        return None
    section = held_out_section(config.data)
    if section:
        return _read(config, name_held_out(config.data), section)
    chats = build_chats(row_encoder(config))
    _check_unchanged(config, path, chats)
    return chats.held_out


def _check_unchanged(config: RunConfig, path: Path, chats: Chats) -> None:
    """Make sure that the share held out is the one that the run held out: it is drawn from the rows of the files."""
    run = run_of(path)
    recorded: dict[str, Any] = run.recorded_data() if run else {}
    facts = chats.facts()
    for name in ("train", "held_out"):
        before, now = recorded.get(name) or {}, facts[name] or {}
        if any(key in before and before[key] != now.get(key) for key in COMPARED):
            raise DataError(
                f"{name_sources(config.data.train)}: the file is not the one that the run was trained on ({name}: "
                f"{before['rows']} rows and {before['tokens']:,} tokens then, {now.get('rows', 0)} and "
                f"{now.get('tokens', 0):,} now), so the share held out would be another; name held-out chats with "
                "--data FILE"
            )
