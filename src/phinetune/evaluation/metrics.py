"""How close answers are to their references, by well-kept libraries."""

from __future__ import annotations

from collections.abc import Sequence

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 in percent (Lin 2004), by rouge-score, without stemming."""
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return float(100 * sum(scores) / len(scores))


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 in percent (Popović 2015), by sacrebleu with its defaults."""
    return float(sacrebleu.corpus_chrf(list(answers), [list(references)]).score)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Percent of answers equal to their reference, white space at both ends aside."""
    equal = [a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]
    return 100 * sum(equal) / len(equal)
