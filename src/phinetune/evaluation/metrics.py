"""Metrics that say how good one answer is, from well-known libraries. A metric's result is its mean over the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sacrebleu

from phinetune.chats.template import Message
from phinetune.config.evaluation import CustomMetric, EvaluationSection
from phinetune.evaluation import functions, json_answers
from phinetune.evaluation.patterns import matches

# Called with an answer, its reference and the chat before it. Returns a number, or None to leave the row out.
RowMetric = Callable[[str, str, Sequence[Message]], float | None]


@functools.lru_cache(maxsize=4)
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # it loads nltk, and that scipy: a tenth of all imports

    return RougeScorer([kind])


def rouge(kind: str, answer: str, reference: str) -> float:
    """ROUGE F1 in percent (Lin 2004), by rouge-score, without stemming. Kinds: rouge1, rouge2, rougeL."""
    return float(100 * _rouge(kind).score(reference, answer)[kind].fmeasure)


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU in percent, by sacrebleu with its defaults (n-grams longer than the answer are left out)."""
    return float(sacrebleu.sentence_bleu(answer, [reference]).score)


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF2 in percent (Popović 2015), by sacrebleu with its defaults."""
    return float(sacrebleu.sentence_chrf(answer, [reference]).score)


def exact_match(answer: str, reference: str) -> float:
    """100 if the answer equals its reference apart from white space at both ends, else 0."""
    return 100.0 * (answer.strip() == reference.strip())


PAIRWISE: dict[str, Callable[[str, str], float | None]] = {
    "exact_match": exact_match,
    "rouge1": functools.partial(rouge, "rouge1"),
    "rouge2": functools.partial(rouge, "rouge2"),
    "rouge_l": functools.partial(rouge, "rougeL"),
    "bleu": bleu,
    "chrf": chrf,
    "json_valid": json_answers.valid,
    "json_fields": json_answers.fields,
}


def _pairwise(score: Callable[[str, str], float | None], answer: str, reference: str, _: Any) -> float | None:
    return score(answer, reference)


def row_metrics(section: EvaluationSection) -> dict[str, RowMetric]:
    """The metrics that the section names, in its order.

    Raises:
        ConfigError: functions can't be loaded; the error lists all of them.
    """
    loaded = functions.load_all([metric for metric in section.metrics if isinstance(metric, CustomMetric)])
    chosen: dict[str, RowMetric] = {}
    for metric in section.metrics:
        if isinstance(metric, str):
            chosen[metric] = functools.partial(_pairwise, PAIRWISE[metric])
        elif metric.regex is not None:
            chosen[metric.name] = functools.partial(matches, metric.regex)
        else:
            chosen[metric.name] = loaded[metric.name]
    return chosen
