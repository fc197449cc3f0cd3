"""Differences between two texts."""

from __future__ import annotations

import random
import string

import pytest

from phinetune.reporting.marking import MarkedText, mark


def test_only_what_differs_is_marked_by_whole_words() -> None:
    marked = mark('We sent it: {"order": "76879"}', 'We sent them: {"order": "76870"}')
    assert [piece.text for piece in marked.pieces if piece.differs] == ["it", "76879"]
    assert not marked.throughout


def test_equal_texts_have_no_mark() -> None:
    assert mark("One.\nTwo.", "One.\nTwo.").pieces == [MarkedText("One.\nTwo.", False)]


def test_texts_with_little_in_common_are_not_littered_with_marks() -> None:
    marked = mark("The order is a classic example of a custom order.", "Sorry about that, we are on it!")
    assert marked.throughout
    assert [piece.differs for piece in marked.pieces] == [False]


@pytest.mark.parametrize(("text", "other"), [("", ""), ("", "a b"), ("a b", ""), (" ", "x"), ("ä 中文\u2028!", "ä 文")])
def test_no_letter_is_lost(text: str, other: str) -> None:
    assert "".join(piece.text for piece in mark(text, other).pieces) == text


def test_no_letter_is_lost_of_random_texts() -> None:
    draw = random.Random(0)
    for _ in range(200):
        text, other = ("".join(draw.choices(string.ascii_letters[:4] + " \n.", k=draw.randrange(60))) for _ in "ab")
        marked = mark(text, other)
        assert "".join(piece.text for piece in marked.pieces) == text
        assert not any(piece.differs and not piece.text.strip() for piece in marked.pieces)


def test_a_very_long_answer_is_marked_too() -> None:
    text = "word " * 20_000
    assert [p.text for p in mark(text + "end", text + "stop").pieces if p.differs] in ([], ["end"])
