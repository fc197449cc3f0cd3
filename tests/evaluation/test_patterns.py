"""Answers that repeat themselves."""

from __future__ import annotations

import pytest

from phinetune.evaluation.patterns import repeats


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("", False),
        ("one two three four", False),
        ("I am here to help. I am here to help.", False),
        ("I am here to help. " * 3, True),
        ("no no no no no no", True),
        ("十分に注意して、ゆっくりと読み進めてください、" * 4, True),
        ("春は曙。やうやう白くなりゆく山際、少し明かりて、紫だちたる雲の細くたなびきたる。", False),
    ],
    ids=["empty", "four words", "twice", "three times", "one word", "without spaces", "without spaces or repetition"],
)
def test_three_times_the_same_words(answer: str, wanted: bool) -> None:
    assert repeats(answer) is wanted


def test_what_the_reference_does_as_well_is_no_fault() -> None:
    song = "row row row your boat " * 3
    assert not repeats(song, song)
