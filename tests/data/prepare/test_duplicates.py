"""Rows that are alike: exactly, nearly, or not."""

from __future__ import annotations

import random

import pytest

from phinetune.data.prepare.duplicates import ALIKE, NearDuplicates, exact_key, hashes_of, shingles


def test_case_and_white_space_make_no_difference() -> None:
    assert exact_key("Hello  there\nyou") == exact_key(" hello THERE you ")
    assert exact_key("Hello there") != exact_key("Hello there.")


def jaccard(left: str, right: str) -> float:
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_that_an_exact_comparison_finds() -> None:
    """Every match has the likeness asked for, and hardly a row that has it is missed."""
    draw = random.Random(3)
    words = [f"w{i}" for i in range(400)]
    texts: list[str] = []
    for _ in range(60):
        text = [draw.choice(words) for _ in range(80)]
        for changes in (0, 1, 2, 4, 8, 20):
            copy = list(text)
            for place in draw.sample(range(80), changes):
                copy[place] = "x" + str(draw.random())
            texts.append(" ".join(copy))
    draw.shuffle(texts)
    near = NearDuplicates()
    kept: list[int] = []
    missed = 0
    for number, text in enumerate(texts):
        match = near.add(number, hashes_of(text))
        alike = [other for other in kept if jaccard(text, texts[other]) >= ALIKE]
        if match is None:
            missed += bool(alike)
            kept.append(number)
        else:
            assert match in alike
    assert len(texts) - len(kept) > 80
    assert missed <= 2


@pytest.mark.parametrize("text", ["", "Hi", "one two three four"])
def test_short_rows_are_never_nearly_alike(text: str) -> None:
    near = NearDuplicates()
    assert near.add(0, hashes_of(text)) is None
    assert near.add(1, hashes_of(text + " x")) is None


def test_text_without_spaces_between_words_is_compared_by_letters() -> None:
    text = "今日は天気が良いので散歩に行きましょうそれから美味しいものを食べて家に帰りたいと思います" * 2
    near = NearDuplicates()
    assert near.add(0, hashes_of(text)) is None
    assert near.add(1, hashes_of(text.replace("散歩", "買物", 1))) == 0
    other = "全く違う文章をここに書いておきますので似ているとは言えないはずですねたぶんそうでしょう"
    assert near.find(hashes_of(other)) is None
