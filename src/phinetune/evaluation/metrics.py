"""How good one answer is, by well-kept libraries; every metric gives a number a row, and its mean is the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from phinetune.chat.template import Message
from phinetune.config.run import CustomMetric, EvaluationSection
from phinetune.evaluation import functions, json_answers
from phinetune.evaluation.patterns import matches

# Of an answer, its reference and the chat before it: a number, or None where the metric says nothing of this row.
RowMetric = Callable[[str, str, Sequence[Message]], float | None]


@functools.lru_cache(maxsize=4)
def _rouge(kind: str) -> Any:
    return RougeScorer([kind])


def rouge(kind: str, answer: str, reference: str) -> float:
    """ROUGE F1 in percent (Lin 2004), by rouge-score, without stemming. Kinds: rouge1, rouge2, rougeL."""
    return float(100 * _rouge(kind).score(reference, answer)[kind].fmeasure)


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU in percent, by sacrebleu with its defaults (orders that are too long for the answer left out)."""
    return float(sacrebleu.sentence_bleu(answer, [reference]).score)


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF2 in percent (Popović 2015), by sacrebleu with its defaults."""
    return float(sacrebleu.sentence_chrf(answer, [reference]).score)


def exact_match(answer: str, reference: str) -> float:
    """100 for an answer equal to its reference, white space at both ends aside."""
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
        ConfigError: functions that can't be had, all of them at once.
    """
    loaded = functions.load_all([one for one in section.metrics if isinstance(one, CustomMetric)])
    chosen: dict[str, RowMetric] = {}
    for one in section.metrics:
        if isinstance(one, str):
            chosen[one] = functools.partial(_pairwise, PAIRWISE[one])
        elif one.regex is not None:
            chosen[one.name] = functools.partial(matches, one.regex)
        else:
            chosen[one.name] = loaded[one.name]
    return chosen
