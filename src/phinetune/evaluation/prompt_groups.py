"""Sorts prompts into groups that speak of like things: spherical k-means over words weighed by tf-idf.

The method is Dhillon & Modha 2001, with the seeding of k-means++ (Arthur & Vassilvitskii 2007). A group is named by the
words that weigh most in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

MOST_PROMPTS = 5_000  # further ones are in no group
MOST_WORDS = 2_000
MOST_GROUPS = 8
A_GROUP = 10  # prompts that a group should have on the average
COMMON = 0.5  # share of the prompts; a word in more of them is the form of the task
ROUNDS, STARTS = 30, 4
NAMING = 3  # words
SEED = 0
_CHINESE = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # and Japanese: words that are not separated


def prompt_groups(prompts: Sequence[str]) -> list[str | None]:
    """For each prompt the name of its group; None for one in no group, all of them if there are too few prompts."""
    nowhere: list[str | None] = [None] * len(prompts)
    count = min(MOST_GROUPS, min(len(prompts), MOST_PROMPTS) // A_GROUP)
    if count < 2:
        return nowhere
    vectors, words = _weighed([_words(prompt) for prompt in prompts[:MOST_PROMPTS]])
    known = np.flatnonzero(vectors.any(1)) if len(words) else np.array([], dtype=np.int64)
    if len(known) < 2 * A_GROUP:
        return nowhere
    groups, centres = _best_of(vectors[known], count)
    names = [_name(centre, words) for centre in centres]
    found = nowhere
    for place, group in zip(known, groups, strict=True):
        found[int(place)] = names[group]
    return found


def _words(text: str) -> list[str]:
    """The words of a text; of one whose words are not separated, its pairs of letters."""
    found: list[str] = []
    for word in re.findall(r"[^\W\d_]+", text.casefold()):
        if _CHINESE.search(word):
            found += [word[i : i + 2] for i in range(max(1, len(word) - 1))]
        elif len(word) > 2:
            found.append(word)
    return found


def _weighed(texts: Sequence[list[str]]) -> tuple[Vectors, list[str]]:
    """tf-idf vectors of length 1, shape (texts, words), and the words. A text without any known word has zeros."""
    seen = Counter(word for text in texts for word in set(text))
    usable = [(word, n) for word, n in seen.most_common() if 2 <= n <= COMMON * len(texts)][:MOST_WORDS]
    place = {word: i for i, (word, _) in enumerate(usable)}
    vectors = np.zeros((len(texts), len(usable)), dtype=np.float32)
    for row, text in enumerate(texts):
        for word, times in Counter(text).items():
            if word in place:
                vectors[row, place[word]] = 1 + np.log(times)
    vectors *= np.log(len(texts) / np.array([n for _, n in usable], dtype=np.float32))
    return _of_length_one(vectors), [word for word, _ in usable]


def _of_length_one(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths == 0, 1, lengths), dtype=np.float32)


def _best_of(vectors: Vectors, count: int) -> tuple[NDArray[np.int64], Vectors]:
    """The groups and centres of the best of some starts."""
    rng = np.random.default_rng(SEED)
    made = [_grouped(vectors, _first_centres(vectors, count, rng)) for _ in range(STARTS)]
    return max(made, key=lambda one: float((vectors * one[1][one[0]]).sum()))


def _first_centres(vectors: Vectors, count: int, rng: np.random.Generator) -> Vectors:
    """Centres far from each other: each next one is drawn by how unlike it is to those before."""
    chosen = [int(rng.integers(len(vectors)))]
    while len(chosen) < count:
        unlike = np.clip(1 - (vectors @ vectors[chosen].T).max(1), 0, None).astype(np.float64)
        if unlike.sum() < 1e-9:
            break
        chosen.append(int(rng.choice(len(vectors), p=unlike / unlike.sum())))
    return vectors[chosen]


def _grouped(vectors: Vectors, centres: Vectors) -> tuple[NDArray[np.int64], Vectors]:
    groups = (vectors @ centres.T).argmax(1)
    for _ in range(ROUNDS):
        sums = np.zeros_like(centres)
        np.add.at(sums, groups, vectors)
        centres = _of_length_one(sums)
        moved = (vectors @ centres.T).argmax(1)
        if (moved == groups).all():
            break
        groups = moved
    return groups, centres


def _name(centre: Vectors, words: Sequence[str]) -> str:
    return ", ".join(words[i] for i in np.argsort(-centre, kind="stable")[:NAMING] if centre[i] > 0)
