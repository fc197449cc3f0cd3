"""Which kinds of held-out rows a tuned model has learnt worst: by tag, length, language and what prompts speak of."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.copies import text_of
from phinetune.engine.scoring import Score
from phinetune.evaluation.bootstrap import Array, Units, drawn_at_a_time, resamples
from phinetune.evaluation.drawn_together import units_of
from phinetune.evaluation.prompt_groups import prompt_groups

FEWEST = 20  # held-out rows, before anything is said
LEAST = 5  # rows of a kind, and of the others
SHOWN = 8  # kinds
EXAMPLES = 3  # rows of a kind that are shown
LETTERS = 120  # of a prompt that is shown
LEVEL = 99  # percent: many kinds are looked at, so one of a hundred may stand out by chance
CHARACTERS = 4_000  # of a chat that the script is looked for in
# The first word of a letter's name in Unicode tells its script. Those that are written together count as one.
SCRIPTS = {
    "CJK": "Chinese or Japanese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "LATIN": "Latin letters",
    "CYRILLIC": "Cyrillic letters",
}

Kinds = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class HardKind:
    """A kind of rows whose loss stands clearly above that of the other rows.

    Attributes:
        by: tag, length, language or prompts.
        name: of the kind.
        rows: how many held-out rows are of it.
        loss, base: nats a labelled token of the tuned model and of its base.
        above: how far the loss stands above the others', with its interval (`low`, `high`).
        examples: its worst rows: `prompt` and `loss`, and the `place` (file and line) where it is known.
    """

    by: str
    name: str
    rows: int
    loss: float
    base: float
    above: float
    low: float
    high: float
    examples: list[dict[str, Any]]

    @property
    def called(self) -> str:
        """The kind as tables name it."""
        return f"{self.by}: {self.name}"


def hard_rows(
    base: Sequence[Score], tuned: Sequence[Score], held_out: ChatSet, before: Sequence[Score] | None = None
) -> dict[str, Any] | None:
    """What was learnt worst, as results.json holds it; None if there are too few held-out rows to say anything.

    Args:
        base, tuned: the scores of the held-out rows.
        before: the same by a model that was trained on half of the rows; each kind then has its gain since
            (`last_doubling`).

    Returns:
        `rows`; `looked_at`, the names of what rows were sorted by; `kinds`, each a `HardKind`, the worst first;
            `level` of the intervals; and `text`, all of it in a sentence.
    """
    if len(tuned) < FEWEST:
        return None
    kinds, prompts = kinds_of(held_out)
    found = hard_kinds(base, tuned, kinds, prompts, held_out.where, units_of(held_out))
    trees = [asdict(one) for one in found[:SHOWN]]
    for tree in trees:
        if before is None:
            break
        places = [place for place, kind in enumerate(kinds[tree["by"]]) if kind == tree["name"]]
        tree["last_doubling"] = sum((before[place] for place in places), Score()).loss - tree["loss"]
    return {
        "rows": len(tuned),
        "looked_at": list(kinds),
        "kinds": trees,
        "level": LEVEL,
        "text": hard_sentence(found, list(kinds)),
    }


def hard_sentence(found: Sequence[HardKind], looked_at: Sequence[str]) -> str:
    """What was learnt worst, in words."""
    if not found:
        return f"No kind of rows is learnt clearly worse than the others (by {', '.join(looked_at)})."
    worst = found[0]
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"Learnt worst: {worst.called} ({worst.rows} rows): loss {worst.loss:.3g}, {worst.above:.2g} above the other "
        f"rows{more}."
    )


def kinds_of(held_out: ChatSet) -> tuple[Kinds, list[str]]:
    """What kinds of rows there are: for each way to sort them the kind of each row; and each row's prompt."""
    prompts, texts = [""] * len(held_out), [""] * len(held_out)
    for chat, place in zip(held_out.chats, held_out.places, strict=True):
        prompts[place] = next((m["content"] or "" for m in reversed(chat) if m["role"] != "assistant"), "")
        texts[place] = text_of(chat[-2:])[:CHARACTERS]
    kinds: dict[str, Sequence[str | None]] = {}
    if any(held_out.tags):
        kinds["tag"] = list(held_out.tags)
    kinds["length"] = length_kinds(held_out.lengths().tolist())
    if any(texts):
        kinds["language"] = [script_of(text) for text in texts]
        kinds["prompts"] = prompt_groups(prompts)
    return {by: named for by, named in kinds.items() if len(set(named) - {None}) > 1}, prompts


def length_kinds(lengths: Sequence[int]) -> list[str]:
    """Each row as one of the shortest, the middle or the longest third, with the tokens that they have."""
    first, second = (int(x) for x in np.quantile(np.asarray(lengths), [1 / 3, 2 / 3]))
    middle = f"{second:,} tokens" if second == first + 1 else f"{first + 1:,} to {second:,} tokens"
    names = [f"up to {first:,} tokens", middle, f"over {second:,} tokens"]
    return [names[(length > first) + (length > second)] for length in lengths]


def script_of(text: str) -> str | None:
    """The script that most letters of a text have, in a word or two; None without letters. A guess at the language."""
    counts: Counter[str] = Counter()
    for letter in text:
        if letter.isalpha():
            counts["LATIN" if letter.isascii() else unicodedata.name(letter, "?").split()[0]] += 1
    if not counts:
        return None
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * counts["CJK"] and counts["CJK"]:
        counts["HIRAGANA"] += counts.pop("CJK")  # Chinese has no such letters
    for script in ("CJK", "HIRAGANA", "HANGUL"):
        counts[script] *= 3  # a word has fewer of these letters than of others
    name = counts.most_common(1)[0][0]
    return SCRIPTS.get(name, f"{name.capitalize()} letters")


def hard_kinds(
    base: Sequence[Score],
    tuned: Sequence[Score],
    kinds: Kinds,
    prompts: Sequence[str],
    where: Sequence[str] = (),
    units: Units | None = None,
) -> list[HardKind]:
    """The kinds whose loss stands clearly above that of the other rows, the worst first.

    Args:
        kinds: for each way to sort rows, the kind of each row.
        where: the place of each row; empty where they are not known.
        units: see `bootstrap.resamples`.
    """
    named = [(by, kind) for by, marks in kinds.items() for kind in dict.fromkeys(marks) if kind is not None]
    members = np.array([[mark == kind for mark in kinds[by]] for by, kind in named], dtype=np.float64)
    if not named or drawn_at_a_time(len(tuned), units) < 2:
        return []
    nll, tokens = (np.array([getattr(score, name) for score in tuned], dtype=np.float64) for name in ("nll", "tokens"))
    drawn = np.concatenate([_above(counts, members, nll, tokens) for counts in resamples(len(tuned), units)])
    (measured,) = _above(np.ones((1, len(tuned))), members, nll, tokens)
    edge = (100 - LEVEL) / 2
    found, seen = [], set()
    for i, (by, kind) in enumerate(named):
        places = [place for place in range(len(tuned)) if members[i, place]]
        if members[i].tobytes() in seen:  # the very rows of another kind
            continue
        seen.add(members[i].tobytes())
        if not LEAST <= len(places) <= len(tuned) - LEAST:
            continue
        has_number = np.isfinite(drawn[:, i])
        low, high = np.percentile(drawn[has_number, i], [edge, 100 - edge]) if has_number.any() else (0.0, 0.0)
        if low > 0:
            loss, before = (sum((scores[place] for place in places), Score()).loss for scores in (tuned, base))
            ends = float(measured[i]), float(low), float(high)
            found.append(HardKind(by, kind, len(places), loss, before, *ends, _worst(places, tuned, prompts, where)))
    return sorted(found, key=lambda one: -one.above)


def _above(counts: Array, members: Array, nll: Array, tokens: Array) -> Array:
    """How far the loss of each kind stands above that of the other rows, shape (resamples, kinds).

    Args:
        counts: how often each resample has each row, shape (resamples, rows).
        members: 1 where a row is of a kind, else 0, shape (kinds, rows).
    """
    own = [counts @ (members * one).T for one in (nll, tokens)]
    rest = [counts @ ((1 - members) * one).T for one in (nll, tokens)]
    with np.errstate(invalid="ignore", divide="ignore"):
        above: Array = own[0] / own[1] - rest[0] / rest[1]
    return above


def _worst(
    places: Sequence[int], scores: Sequence[Score], prompts: Sequence[str], where: Sequence[str]
) -> list[dict[str, Any]]:
    worst = sorted(places, key=lambda place: -scores[place].loss)[:EXAMPLES]
    return [
        {
            "prompt": _short(prompts[place]),
            "loss": round(scores[place].loss, 4),
            **({"place": where[place]} if where else {}),
        }
        for place in worst
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LETTERS else f"{line[:LETTERS]} …"
