"""The held-out chats of a run, or of any file, encoded as the run's own were; no weight is needed for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.checkpoints.opened import run_of
from phinetune.checkpoints.tokenizer import open_config, open_tokenizer
from phinetune.config.data import DataSection
from phinetune.config.run import RunConfig
from phinetune.data.prepare.build_sets import SMALL, build_chats, compare_sets, read_few, read_sets
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.named_sources import name_sources, weighted
from phinetune.data.prepare.sources import check_there, held_out_section, name_held_out, name_test, test_section
from phinetune.data.read.any_source import check_source
from phinetune.data.read.held_data import held_rows, is_held_name
from phinetune.errors import DataError
from phinetune.training.limits import limit_length
from phinetune.training.objective_keys import with_objective_keys
from phinetune.training.prepare import SettledRun
from phinetune.training.recorded import HELD_OUT_ROWS, rows_digest
from phinetune.training.settings import read_settings
from phinetune.training.warm_start import with_adapters_base

logger = logging.getLogger(__name__)

# Of a set's report: what differs when the files have changed.
COMPARED = ("rows", "kept", "tokens", "trainable_tokens")


def row_encoder(config: RunConfig, *, of_a_run: bool = False) -> RowEncoder:
    """How rows become examples by a configuration.

    Args:
        of_a_run: whether a run wrote the configuration. Then what it does not hold had a fixed default.

    Raises:
        PhinetuneError: an unknown key, or no tokenizer there.
    """
    config, objective, _ = with_objective_keys(with_adapters_base(config))
    settings = read_settings(config.peft_config, config.training_config)
    settings = limit_length(settings.without_auto() if of_a_run else settings, open_config(config.model))
    settled = SettledRun(config, settings, objective)
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
    check_there([path for path, _ in weighted(section.train)])
    encode = row_encoder(config, of_a_run=True)
    held_out = read_sets(name, section.train, replace(encode, section=section))[0]
    _compare_with_training(encode, held_out)
    return held_out


def _compare_with_training(encode: RowEncoder, held_out: ChatSet) -> None:
    """Count the rows that the run trained on, if its training rows are few and on this disk; else say why not."""
    sources = [path for path, _ in weighted(encode.section.train)]
    if not sources:
        return
    reason = next((why for source in sources if (why := _why_not_here(source))), None)
    if reason is None:
        try:
            train = read_few(encode)
        except DataError as error:
            reason = f"these can't be read: {error.problems[0]}"
        else:
            if train:
                compare_sets(train, held_out)
                return
            reason = f"these are more than {SMALL:,}"
    held_out.not_compared = f"the held-out chats were not compared with the training rows, because {reason}"


def _why_not_here(source: str) -> str | None:
    """Why the rows of a source are not on this disk; None if they are."""
    if held_rows(source) or Path(source).expanduser().exists():
        return None
    if is_held_name(source):
        return f"{source} was in a Python program's memory"
    return f"{source} is gone" if check_source(source) else f"{source} is no file or folder on this disk"


def held_out_chats(config: RunConfig, path: Path) -> ChatSet | None:
    """The chats that the run was measured on: those of its final verdict, a file's, or the share of its training chats;
    None where it has none.

    Of a file that has changed, a warning says so.

    Raises:
        DataError: a file is missing or unusable, or has changed so that the share would be another one.
    """
    if config.data.test is not None:
        return _read_again(config, path, "test", name_test(config.data), test_section(config.data))
    if config.data.eval is None:
        return None
    section = held_out_section(config.data)
    if section:
        return _read_again(config, path, "held_out", name_held_out(config.data), section)
    chats = build_chats(row_encoder(config, of_a_run=True))
    assert chats.held_out is not None
    changed = _changed(path, chats.facts(), chats.held_out)
    if changed:
        raise DataError(
            f"{name_sources(config.data.train)}: the file is not the one that the run was trained on ({changed}), so "
            "the share held out would be another; name held-out chats with --data FILE"
        )
    return chats.held_out


def _read_again(config: RunConfig, path: Path, part: str, name: str, section: DataSection | None) -> ChatSet:
    """The chats of a file or a split that the run was measured on. If they have changed, a warning says so."""
    assert section is not None
    measured = _read(config, name, section)
    changed = _changed(path, {part: measured.report.to_dict()}, measured)
    if changed:
        logger.warning(
            "%s: these are not the chats that the run was measured on in training (%s), so its own results are not to "
            "be compared with these",
            name,
            changed,
        )
    return measured


def _changed(path: Path, facts: Mapping[str, Any], held_out: ChatSet) -> str | None:
    """How the rows differ from those that the run recorded; None if they don't, or it recorded none.

    Args:
        facts: the sets to compare, as `Chats.facts` returns them.
        held_out: the rows that must be the very ones of the run. Older runs recorded only how many they were.
    """
    run = run_of(path)
    recorded: dict[str, Any] = run.recorded_data() if run else {}
    for name in ("train", "held_out", "test"):
        before, now = recorded.get(name) or {}, facts.get(name) or {}
        if now and any(key in before and before[key] != now.get(key) for key in COMPARED):
            return (
                f"{name}: {before['rows']} rows and {before['tokens']:,} tokens then, {now['rows']} and "
                f"{now['tokens']:,} now"
            )
    if "test" in facts:
        return None
    digest = ((run.read_start() if run else {}).get("decides") or {}).get(HELD_OUT_ROWS)
    differs = digest is not None and digest != rows_digest(held_out)
    return "held_out: as many rows and tokens as then, but others" if differs else None
