"""A run's chats, read, checked, encoded and split, and a report of what became of them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from phinetune.config import DataSection, WeightedFile
from phinetune.data.chat import Encoded, Encoder, ends_a_turn
from phinetune.data.outcome import Outcome, outcomes
from phinetune.data.read import Row, check_source, read_rows
from phinetune.errors import DataError, at_most
from phinetune.model.template import Message

REASONS_SHOWN = 4


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

    def count(self, outcome: Outcome) -> None:
        """Add one row."""
        self.rows += 1
        self.cut += outcome.cut
        if outcome.form:
            self.forms[outcome.form] += 1
        if outcome.reason:
            self.dropped[outcome.reason] += 1
        if outcome.encoded:
            self.kept += 1
            self.tokens += len(outcome.encoded.input_ids)
            self.trainable_tokens += outcome.encoded.trainable
            self.longest = max(self.longest, len(outcome.encoded.input_ids))

    def lines(self) -> list[str]:
        """The report in sentences for a person."""
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.most_common())
        dropped = f", {sum(self.dropped.values())} dropped" if self.dropped else ""
        cut = f", {self.cut} cut to fit" if self.cut else ""
        rest = sum(count for _, count in self.dropped.most_common()[REASONS_SHOWN:])
        share = self.trainable_tokens / max(1, self.tokens)
        return [
            f"{self.source}: {self.rows} rows ({forms}): {self.kept} kept{cut}{dropped}; {self.tokens:,} tokens, "
            f"{self.trainable_tokens:,} of them trained on ({share:.0%}); longest chat {self.longest} tokens",
            *(f"  dropped {count}: {reason}" for reason, count in self.dropped.most_common(REASONS_SHOWN)),
            *([f"  dropped {rest} for other reasons"] if rest else []),
        ]


@dataclass
class ChatSet:
    """Chats of one set, as messages and as tokens. Rows that are text or ids have tokens only.

    Attributes:
        places: where in `encoded` each chat stands.
        tags: of each in `encoded`, what its row has in the column `data.tag`; empty without one.
    """

    chats: list[list[Message]]
    encoded: list[Encoded]
    report: Report
    places: list[int] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

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

    def facts(self) -> dict[str, Any]:
        """The reports of both sets, as JSON holds them; `held_out` is None without held-out chats."""
        sets = {"train": self.train, "held_out": self.held_out}
        return {name: made.report.to_dict() if made else None for name, made in sets.items()}


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
            problems += [problem for one, _ in weighted(source) if (problem := check_source(one))]
    if problems:
        raise DataError(problems)


def build_chats(section: DataSection, encoder: Encoder, max_length: int | None) -> Chats:
    """Read and encode what the section names, split as it says.

    Raises:
        DataError: a source is missing, broken or empty; rows can't be used (all listed); no label ends a turn.
    """
    check_sources(section)
    train, held_out = _split(section)
    source = name_sources(section.train)
    made = build_set(source, train, section, encoder, max_length)
    if not ends_a_turn(encoder, made.encoded):
        raise DataError(
            f"{made.report.source}: no label is an end-of-turn token, so the model would never learn to stop; "
            "check data.loss_on and training_config.max_length"
        )
    if held_out is None:
        return Chats(made, None)
    name = f"{source} (held out)" if isinstance(section.eval, float) else name_sources(section.eval)
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
    for outcome in outcomes(rows, section, encoder, max_length):
        made.report.count(outcome)
        if outcome.error:
            problems.append(f"{outcome.row.where}: {outcome.error}")
        if outcome.encoded:
            made.encoded.append(outcome.encoded)
            if section.tag:
                made.tags.append(str(outcome.row.fields.get(section.tag, "")))
            if outcome.chat:
                made.chats.append(outcome.chat)
                made.places.append(len(made.encoded) - 1)
    if problems and section.invalid_rows == "fail":
        raise DataError([*at_most(problems), "(data.invalid_rows: drop leaves such rows out and counts them)"])
    if not made.encoded:
        reasons = "; ".join(f"{count} {reason}" for reason, count in made.report.dropped.items())
        raise DataError(f"{name}: no chat to use: " + (reasons or "the set is empty"))
    return made


def _split(section: DataSection) -> tuple[list[Row], list[Row] | None]:
    """Training rows, each file's by its weight, and held-out rows, each once."""
    sources = weighted(section.train)
    rows: list[tuple[int, Row]] = []
    for i, (path, _) in enumerate(sources):
        left = None if section.limit is None else section.limit - len(rows)
        rows += ((i, row) for row in itertools.islice(read_rows(path, section.split), left))
    if isinstance(section.eval, float):
        rows, held = _hold_out(rows, section.eval, section.seed)
        return _by_weight(rows, sources, section.seed), [row for _, row in held]
    train = _by_weight(rows, sources, section.seed)
    return train, None if section.eval is None else list(read_all(section.eval, section.split))


def _hold_out(
    rows: Sequence[tuple[int, Row]], share: float, seed: int
) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]]]:
    chosen = held_out_places(len(rows), share, seed)
    parts: tuple[list[tuple[int, Row]], list[tuple[int, Row]]] = ([], [])
    for i, row in enumerate(rows):
        parts[i in chosen].append(row)
    return parts


def held_out_places(count: int, share: float, seed: int) -> set[int]:
    """Which of `count` rows are held out.

    Raises:
        DataError: one side would be empty.
    """
    held = round(count * share)
    if not 0 < held < count:
        raise DataError(f"data.eval: {share} of {count} rows leaves one side empty; give a file instead")
    return set(random.Random(seed).sample(range(count), held))


def _by_weight(rows: Sequence[tuple[int, Row]], sources: Sequence[tuple[str, float]], seed: int) -> list[Row]:
    """Every row as often as the weight of its file says; the part after the point falls to rows drawn by `seed`."""
    places: list[list[int]] = [[] for _ in sources]
    for place, (i, _) in enumerate(rows):
        places[i].append(place)
    times = [0] * len(rows)
    for i, (_, weight) in enumerate(sources):
        whole = int(weight)
        extra = round((weight - whole) * len(places[i]))
        drawn = set(random.Random(f"{seed} {i}").sample(places[i], extra))
        for place in places[i]:
            times[place] = whole + (place in drawn)
    return [row for place, (_, row) in enumerate(rows) for _ in range(times[place])]


def read_all(source: str | Sequence[str], split: str) -> Iterator[Row]:
    """Rows of one source or of several, one after the other."""
    return itertools.chain.from_iterable(read_rows(one, split) for one, _ in weighted(source))


def weighted(source: str | Sequence[str | WeightedFile] | None) -> list[tuple[str, float]]:
    """Each source and its weight, 1 where none is given."""
    listed = [source] if isinstance(source, str) else list(source or [])
    return [(one, 1.0) if isinstance(one, str) else (one.path, one.weight) for one in listed]


def name_sources(source: str | Sequence[str | WeightedFile] | None) -> str:
    """The sources in a line: `a.jsonl, b.jsonl × 2`."""
    return ", ".join(path if weight == 1 else f"{path} × {weight:g}" for path, weight in weighted(source))
