"""The held-out chats of a run, or of any file, encoded as the run's own were; no weight is needed for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.checkpoints.opened import run_of
from phinetune.checkpoints.tokenizer import open_tokenizer
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build_sets import build_chats, check_sources, name_sources, read_sets
from phinetune.data.prepare.chat_sets import Chats, ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.errors import DataError
from phinetune.training.objectives.registry import make_objective
from phinetune.training.prepare import SettledRun
from phinetune.training.settings import read_settings

# Of a set's report: what differs when the files have changed.
COMPARED = ("rows", "kept", "tokens", "trainable_tokens")


def row_encoder(config: RunConfig) -> RowEncoder:
    """How rows become examples by a configuration.

    Raises:
        PhinetuneError: an unknown key, or no tokenizer there.
    """
    settings = read_settings(config.peft_config, config.training_config)
    settled = SettledRun(config, settings, make_objective(config.objective))
    return settled.row_encoder(open_tokenizer(config.model))


def chats_of(config: RunConfig, source: str | Sequence[str]) -> ChatSet:
    """The chats of a file, or of several, encoded as the run's own were.

    Raises:
        DataError: a file is missing, or its rows can't be used.
    """
    listed = source if isinstance(source, str) else list(source)
    encode = row_encoder(config).with_section(train=listed, eval=None, limit=None)
    check_sources(encode.section)
    return read_sets(name_sources(listed), listed, encode)[0]


def held_out_chats(config: RunConfig, path: Path) -> ChatSet | None:
    """The run's own held-out chats: a file's, or the share of its training chats; None where it has none.

    Raises:
        DataError: a file is missing or unusable, or has changed so that the share would be another one.
    """
    source = config.data.eval
    if source is None:
        return None
    if not isinstance(source, float):
        return chats_of(config, source)
    chats = build_chats(row_encoder(config))
    _check_unchanged(config, path, chats)
    return chats.held_out


def _check_unchanged(config: RunConfig, path: Path, chats: Chats) -> None:
    """Make sure that the share held out is the one that the run held out: it is drawn from the rows of the files."""
    run = run_of(path)
    recorded: dict[str, Any] = run.recorded_data() if run else {}
    for name, found in chats.facts().items():
        before, now = recorded.get(name) or {}, found or {}
        if any(key in before and before[key] != now.get(key) for key in COMPARED):
            raise DataError(
                f"{name_sources(config.data.train)}: the file is not the one that the run was trained on ({name}: "
                f"{before['rows']} rows and {before['tokens']:,} tokens then, {now.get('rows', 0)} and "
                f"{now.get('tokens', 0):,} now), so the share held out would be another; name held-out chats with "
                "--data FILE"
            )
