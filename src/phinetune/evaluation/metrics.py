"""The metrics of answers, by name: from well-known libraries, and a user's own. Most give a number an answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sacrebleu

from phinetune.chats.template import Message
from phinetune.config.evaluation import EvaluationSection
from phinetune.config.judge import JudgeMetric
from phinetune.config.own_metrics import CustomMetric
from phinetune.errors import PhinetuneError
from phinetune.evaluation import functions, json_answers
from phinetune.evaluation.classes import Classes
from phinetune.evaluation.patterns import matches
from phinetune.evaluation.set_metrics import SetMetric

# Called with an answer, its reference and the chat before it. Returns a number, or None to leave the row out.
RowMetric = Callable[[str, str, Sequence[Message]], float | None]
Metrics = Mapping[str, RowMetric | SetMetric]


# Chinese characters and Japanese kana: written without spaces, and dropped by rouge-score's own words (a-z and 0-9).
UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


class RougeWords:
    """rouge-score's words; and each Chinese character or kana as a word, without which such answers all score 0."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._default = DefaultTokenizer(use_stemmer=False)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        pieces = UNSPACED.split(text)  # every second one is a character
        return [
            word for i, piece in enumerate(pieces) for word in ([piece] if i % 2 else self._default.tokenize(piece))
        ]


@functools.lru_cache(maxsize=4)
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # it loads nltk, and that scipy: a tenth of all imports

    return RougeScorer([kind], tokenizer=RougeWords())


def rouge(kind: str, answer: str, reference: str) -> float:
    """ROUGE F1 in percent (Lin 2004), by rouge-score, without stemming, on `RougeWords`: rouge1, rouge2 or rougeL."""
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


def open_metrics(section: EvaluationSection) -> dict[str, RowMetric | SetMetric]:
    """The metrics that the section names, in its order.

    Raises:
        PhinetuneError: functions, files or encoders can't be had; the error lists all of them.
    """
    chosen: dict[str, RowMetric | SetMetric] = {}
    failed: list[PhinetuneError] = []
    for metric in section.metrics:
        if isinstance(metric, JudgeMetric):  # it compares two answers and has no number for one
            continue
        if isinstance(metric, str):
            chosen[metric] = functools.partial(_pairwise, PAIRWISE[metric])
            continue
        try:
            chosen[metric.name] = _own(metric)
        except PhinetuneError as error:
            failed.append(error)
    if failed:
        raise type(failed[0])([problem for error in failed for problem in error.problems])
    return chosen


def _own(metric: CustomMetric) -> RowMetric | SetMetric:
    """What counts a metric of the user's own. Libraries that few runs need are imported where they are."""
    if metric.regex is not None:
        return functools.partial(matches, metric.regex)
    if metric.sql is not None:
        from phinetune.evaluation.sql_answers import SqlResult

        return SqlResult(metric.name, metric.sql)
    if metric.json_schema is not None:
        from phinetune.evaluation.json_schemas import FitsSchema

        return FitsSchema(metric.name, metric.json_schema)
    if metric.similarity is not None:
        from phinetune.evaluation.similarity import Similarity

        return Similarity(metric.name, metric.similarity)
    if metric.classes is not None:
        return SetMetric(metric, Classes(() if metric.classes == "auto" else tuple(metric.classes)))
    return SetMetric(metric, functions.set_function(metric)) if metric.compute else functions.row_function(metric)
