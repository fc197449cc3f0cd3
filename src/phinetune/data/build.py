"""A run's chats, read, checked, encoded and split, and a report of what became of them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from phinetune.config import DataSection
from phinetune.data.chat import Encoded, Encoder, ends_a_turn
from phinetune.data.formats import RowError, detect_form, to_messages
from phinetune.data.read import Row, check_source, read_rows
from phinetune.errors import DataError, at_most
from phinetune.model.template import Message

BATCH = 512  # chats tokenised in one call; the tokenizer spreads a call over the cores


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

    def lines(self) -> list[str]:
        """The report in sentences for a person."""
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.most_common())
        dropped = f", {sum(self.dropped.values())} dropped" if self.dropped else ""
        cut = f", {self.cut} cut to fit" if self.cut else ""
        share = self.trainable_tokens / max(1, self.tokens)
        return [
            f"{self.source}: {self.rows} rows ({forms}): {self.kept} kept{cut}{dropped}; {self.tokens:,} tokens, "
            f"{self.trainable_tokens:,} of them trained on ({share:.0%}); longest chat {self.longest} tokens",
            *(f"  dropped {count}: {reason}" for reason, count in self.dropped.most_common()),
        ]


@dataclass
class ChatSet:
    """Chats of one set, as messages and as tokens, row by row the same."""

    chats: list[list[Message]]
    encoded: list[Encoded]
    report: Report

    def __len__(self) -> int:
        return len(self.encoded)

    def dataset(self) -> Dataset:
        """`input_ids` and `labels`, as the trainer takes them."""
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


def check_sources(section: DataSection) -> None:
    """Make sure that the files named are there, before anything slow begins.

    Raises:
        DataError: every source that is missing or of an unknown kind.
    """
    if section.train is None:
        raise DataError("data.train: no file given; set it to a file of chats")
    problems = []
    for source in (section.train, section.eval):
        if not isinstance(source, float) and source is not None:
            problems += [problem for one in _listed(source) if (problem := check_source(one))]
    if problems:
        raise DataError(problems)


def build_chats(section: DataSection, encoder: Encoder, max_length: int | None) -> Chats:
    """Read and encode what the section names, split as it says.

    Raises:
        DataError: a source is missing, broken or empty; rows can't be used (all listed); no label ends a turn.
    """
    check_sources(section)
    train, held_out = _split(section)
    source = ", ".join(_listed(section.train or []))
    made = build_set(source, train, section, encoder, max_length)
    if not ends_a_turn(encoder, made.encoded):
        raise DataError(
            f"{made.report.source}: no label is an end-of-turn token, so the model would never learn to stop; "
            "check data.loss_on and training_config.max_length"
        )
    if held_out is None:
        return Chats(made, None)
    by_share = section.eval is None or isinstance(section.eval, float)
    name = f"{source} (held out)" if by_share else ", ".join(_listed(section.eval))  # type: ignore[arg-type]
    return Chats(made, build_set(name, held_out, section, encoder, max_length))


def build_set(
    name: str, rows: Iterable[Row], section: DataSection, encoder: Encoder, max_length: int | None
) -> ChatSet:
    """Check and encode rows, keeping count of what happened to each.

    Raises:
        DataError: rows that can't be used (unless `invalid_rows` is `drop`), or none that can.
    """
    made = ChatSet([], [], Report(name))
    problems: list[str] = []
    usable = _usable_chats(rows, section, encoder, made.report, problems)
    while batch := list(itertools.islice(usable, BATCH)):
        _encode_batch(batch, section, encoder, max_length, made, problems)
    if problems and section.invalid_rows == "fail":
        raise DataError([*at_most(problems), "(data.invalid_rows: drop leaves such rows out and counts them)"])
    if not made.encoded:
        reasons = "; ".join(f"{count} {reason}" for reason, count in made.report.dropped.items())
        raise DataError(f"{name}: no chat to use: " + (reasons or "the set is empty"))
    return made


def _split(section: DataSection) -> tuple[list[Row], list[Row] | None]:
    train = list(itertools.islice(read_all(section.train or [], section.split), section.limit))
    if section.eval is None:
        return train, None
    if not isinstance(section.eval, float):
        return train, list(read_all(section.eval, section.split))
    count = round(len(train) * section.eval)
    if not 0 < count < len(train):
        raise DataError(f"data.eval: {section.eval} of {len(train)} rows leaves one side empty; give a file instead")
    chosen = set(random.Random(section.seed).sample(range(len(train)), count))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for i, row in enumerate(train):
        parts[i in chosen].append(row)
    return parts


def read_all(source: str | Sequence[str], split: str) -> Iterator[Row]:
    """Rows of one source or of several, one after the other."""
    return itertools.chain.from_iterable(read_rows(one, split) for one in _listed(source))


def _listed(source: str | Sequence[str]) -> list[str]:
    return [source] if isinstance(source, str) else list(source)


def _usable_chats(
    rows: Iterable[Row], section: DataSection, encoder: Encoder, report: Report, problems: list[str]
) -> Iterator[tuple[str, list[Message]]]:
    for where, fields in rows:
        report.rows += 1
        try:
            form = detect_form(fields) if section.format == "auto" else section.format
            chat = encoder.prepare(to_messages(fields, form))
        except RowError as error:
            problems.append(f"{where}: {error}")
            report.dropped[str(error)] += 1
            continue
        report.forms[form] += 1
        yield where, chat


def _encode_batch(
    batch: Sequence[tuple[str, list[Message]]],
    section: DataSection,
    encoder: Encoder,
    max_length: int | None,
    made: ChatSet,
    problems: list[str],
) -> None:
    for (where, chat), row in zip(batch, _encode_all(batch, encoder, made.report, problems), strict=True):
        if row is None:
            continue
        if max_length and len(row.input_ids) > max_length:
            fitted = encoder.fit(chat, max_length) if section.overlong == "cut" else None
            if fitted is None:
                made.report.dropped[f"longer than {max_length} tokens"] += 1
                continue
            made.report.cut += 1
            row = fitted
        if not row.trainable:
            problems.append(f"{where}: no token to train on")
            made.report.dropped["no token to train on"] += 1
            continue
        made.chats.append(chat)
        made.encoded.append(row)
        _count(made.report, row)


def _encode_all(
    batch: Sequence[tuple[str, list[Message]]], encoder: Encoder, report: Report, problems: list[str]
) -> list[Encoded | None]:
    """Encode together; where a template refuses a chat, one by one to find which."""
    try:
        return list(encoder.encode([chat for _, chat in batch]))
    except (RowError, TemplateError):
        rows: list[Encoded | None] = []
        for where, chat in batch:
            try:
                rows += encoder.encode([chat])
            except (RowError, TemplateError) as error:
                reason = str(error) if isinstance(error, RowError) else f"the chat template refuses it: {error}"
                problems.append(f"{where}: {reason}")
                report.dropped[reason] += 1
                rows.append(None)
        return rows


def _count(report: Report, row: Encoded) -> None:
    report.kept += 1
    report.tokens += len(row.input_ids)
    report.trainable_tokens += row.trainable
    report.longest = max(report.longest, len(row.input_ids))
