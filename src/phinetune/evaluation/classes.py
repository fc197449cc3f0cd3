"""Classification: answers sorted into labels, their accuracy and macro-F1, and a confusion matrix.

Precision, recall and F1 of a class are those of its true and false positives (van Rijsbergen 1979). Macro-F1 is the
mean F1 of the classes that occur in the references or among the answers, as scikit-learn's default takes it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.config.own_metrics import ACCURACY, MACRO_F1

MOST = 50  # labels that `classes: auto` takes from the references; more are no classes but texts
NONE = "(none of them)"  # the column of answers that name no label, or several


@dataclass(frozen=True)
class Classes:
    """Sorts texts into labels.

    Attributes:
        labels: as the user names them; empty: those of the references.
    """

    labels: tuple[str, ...]

    def of(self, references: Iterable[str]) -> tuple[str, ...]:
        """The labels for a set of references: those named, or the references' own in alphabetical order."""
        return self.labels or tuple(sorted({reference.strip() for reference in references if reference.strip()}))

    def __call__(self, answers: Sequence[str], references: Sequence[str], _: Any = ()) -> dict[str, float]:
        """Accuracy and macro-F1, in percent. An answer that names no label is wrong, and of no class."""
        matrix = self.matrix(answers, references)
        scored = [one for one in scores(matrix) if one["support"] or one["answered"]]
        right = sum(matrix[i][i] for i in range(len(matrix)))
        return {
            ACCURACY: 100.0 * right / max(1, sum(map(sum, matrix))),
            MACRO_F1: sum(one["f1"] for one in scored) / max(1, len(scored)),
        }

    def matrix(self, answers: Sequence[str], references: Sequence[str]) -> list[list[int]]:
        """How many references of each label got each label as an answer; the last column is `NONE`.

        References that are no label are left out.
        """
        labels = self.of(references)
        counts = Counter(
            (sort(reference, labels), sort(answer, labels))
            for answer, reference in zip(answers, references, strict=True)
        )
        return [[counts[row, column] for column in (*labels, None)] for row in labels]

    def problems(self, references: Sequence[str], name: str) -> list[str]:
        """Why the references can't be sorted: too few or too many labels for `auto`, or none of those named."""
        labels, where = self.of(references), f"evaluation.metrics: `{name}`"
        if not self.labels and not 2 <= len(labels) <= MOST:
            return [
                f"{where}: `classes: auto` found {len(labels)} different answers in the {len(references)} held-out "
                f"prompts, and takes 2 to {MOST}; name the labels, as `classes: [yes, no]`"
            ]
        strange = [(place, one) for place, one in enumerate(references, 1) if sort(one, labels) is None]
        if not strange:
            return []
        place, text = strange[0]
        return [
            f"{where}: {len(strange)} of the {len(references)} held-out prompts have answers of their own that name "
            f"none of its labels ({', '.join(labels[:MOST])}); the first is prompt {place}, {text[:60]!r}"
        ]


def sort(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text names: it is the whole text but for case, white space and marks at its ends, or else the
    only label that stands in the text as a word. None if there is none, or there are several.
    """
    plain = {label.strip().casefold(): label for label in labels}
    whole = text.strip().casefold()
    found = plain.get(whole) or plain.get(whole.strip(".,:;!?\"'`*()[]"))
    if found is not None:
        return found
    named = {match.group() for match in _pattern(tuple(plain)).finditer(whole)}
    return plain[named.pop()] if len(named) == 1 else None


@functools.lru_cache(maxsize=64)
def _pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the labels as a word. The longest come first, so that `not spam` is not taken for `spam`."""
    longest = sorted(labels, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)")


def scores(matrix: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """For each class precision, recall and F1 in percent, its `support` (references) and how often it was `answered`.

    A class that was never answered has the precision 0.
    """
    found = []
    for i, row in enumerate(matrix):
        right, support, answered = row[i], sum(row), sum(other[i] for other in matrix)
        found.append(
            {
                "precision": 100.0 * right / answered if answered else 0.0,
                "recall": 100.0 * right / support if support else 0.0,
                "f1": 200.0 * right / (answered + support) if answered + support else 0.0,
                "support": support,
                "answered": answered,
            }
        )
    return found


def class_tree(classes: Classes, answers: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, Any]:
    """The tables of a metric as results.json holds them: `labels`, and by model `matrix` and `scores`.

    Args:
        answers: by model.
    """
    sides = {}
    for side, texts in answers.items():
        matrix = classes.matrix(texts, references)
        sides[side] = {"matrix": matrix, "scores": scores(matrix)}
    return {"labels": list(classes.of(references)), "sides": sides}
