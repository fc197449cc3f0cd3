"""Metrics on answers whose scores are known."""

from __future__ import annotations

import pytest

from phinetune.evaluation.metrics import chrf, exact_match, rouge_l


def test_equal_answers_score_a_hundred() -> None:
    texts = ["The cat sat.", "On the mat."]
    assert (rouge_l(texts, texts), chrf(texts, texts), exact_match(texts, texts)) == (100, 100, 100)


def test_disjoint_answers_score_nothing() -> None:
    assert (rouge_l(["aaa"], ["zzz"]), chrf(["aaa"], ["zzz"]), exact_match(["aaa"], ["zzz"])) == (0, 0, 0)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "the cat" of three and four words: precision 2/3, recall 2/4
    assert rouge_l(["the black cat"], ["the cat sat down"]) == pytest.approx(100 * 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_exact_match_leaves_white_space_at_the_ends_aside() -> None:
    assert exact_match([" a b\n", "a  b"], ["a b", "a b"]) == 50
