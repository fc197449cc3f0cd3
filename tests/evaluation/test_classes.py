"""Answers sorted into labels: the numbers are scikit-learn's."""

from __future__ import annotations

import random

import pytest

from phinetune.evaluation.classes import MOST, Classes, class_tree, scores, sort

LABELS = ("billing", "delivery", "not spam", "spam")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("billing", "billing"),
        (" Billing.\n", "billing"),
        ("**delivery**", "delivery"),
        ("The topic is delivery, I think.", "delivery"),
        ("not spam", "not spam"),
        ("This is not spam!", "not spam"),
        ("billing or delivery", None),
        ("rebilling", None),
        ("", None),
    ],
)
def test_the_only_label_in_a_text_is_meant(text: str, label: str | None) -> None:
    assert sort(text, LABELS) == label


def test_accuracy_and_macro_f1_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    references = draw.choices(LABELS[:3], k=60)  # `spam` occurs among the answers alone
    answers = [one if draw.random() < 0.5 else draw.choice(LABELS) for one in references]
    found = Classes(LABELS)(answers, references)
    assert found["accuracy"] == pytest.approx(100 * metrics.accuracy_score(references, answers))
    assert found["macro_f1"] == pytest.approx(100 * metrics.f1_score(references, answers, average="macro"))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        references, answers, labels=LABELS, zero_division=0
    )
    tree = class_tree(Classes(LABELS), {"tuned": answers}, references)["sides"]["tuned"]
    assert [row[:-1] for row in tree["matrix"]] == metrics.confusion_matrix(references, answers, labels=LABELS).tolist()
    for i, one in enumerate(tree["scores"]):
        wanted = (100 * precision[i], 100 * recall[i], 100 * f1[i], support[i])
        assert [one[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(wanted)


def test_an_answer_of_no_label_is_wrong_and_of_no_class() -> None:
    matrix = Classes(("a", "b")).matrix(["a", "c", "b or a"], ["a", "a", "b"])
    assert matrix == [[1, 0, 1], [0, 0, 1]]
    assert [one["precision"] for one in scores(matrix)] == [100, 0]


def test_auto_takes_the_references_own_labels() -> None:
    assert Classes(()).of(["b ", "a", "b", ""]) == ("a", "b")
    (problem,) = Classes(()).problems([str(i) for i in range(MOST + 1)], "topic")
    assert f"found {MOST + 1} different answers" in problem


def test_references_that_are_no_label_are_named() -> None:
    (problem,) = Classes(("yes", "no")).problems(["yes", "no", "perhaps", "maybe"], "agreed")
    assert "2 of the 4 held-out prompts" in problem
    assert "the first is prompt 3, 'perhaps'" in problem
    assert Classes(("yes", "no")).problems(["Yes.", "no"], "agreed") == []
