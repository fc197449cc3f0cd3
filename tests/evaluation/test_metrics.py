"""Metrics on answers whose scores are known, and against the libraries themselves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ConfigError, RunError
from phinetune.evaluation.metrics import open_metrics

WORDS = "the a cat dog sat lay on under mat table é naïve don't runs, fast. 7".split(" ")  # noqa: SIM905


def texts(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(count)]


def mean(name: str | dict[str, Any], answers: list[str], references: list[str]) -> float:
    (metric,) = open_metrics(EvaluationSection(metrics=[name])).values()
    return sum(metric(a, r, []) for a, r in zip(answers, references, strict=True)) / len(answers)


def test_means_are_those_of_sacrebleu_and_rouge_score() -> None:
    """Computed by the libraries' own objects, row by row."""
    answers, references = texts(0), texts(1)
    bleu, chrf = sacrebleu.BLEU(effective_order=True), sacrebleu.CHRF()
    rouge = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    wanted = {"bleu": 0.0, "chrf": 0.0, "rouge1": 0.0, "rouge2": 0.0, "rouge_l": 0.0}
    for answer, reference in zip(answers, references, strict=True):
        wanted["bleu"] += bleu.sentence_score(answer, [reference]).score / len(answers)
        wanted["chrf"] += chrf.sentence_score(answer, [reference]).score / len(answers)
        for name, score in rouge.score(reference, answer).items():
            wanted[name.replace("rougeL", "rouge_l")] += 100 * score.fmeasure / len(answers)
    for name, value in wanted.items():
        assert value > 1
        assert mean(name, answers, references) == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rouge_l", "bleu", "chrf", "exact_match"])
def test_equal_answers_score_a_hundred_and_disjoint_ones_nothing(name: str) -> None:
    same = ["The cat sat on the mat.", "On the mat it sat today."]
    assert mean(name, same, same) == pytest.approx(100, abs=1e-9)
    assert mean(name, ["aaa aaa aaa aaa"], ["zzz zzz zzz zzz"]) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "rouge1", "rouge2"),
    [
        ("工单：帐篷 / 漏水", "工单：帐篷 / 漏水", 100, 100),
        ("退款", "退货", 50, 0),
        ("用 Phi-3 训练", "用 phi-3 训练", 100, 100),
        ("テント", "帐篷", 0, 0),
        ("", "帐篷", 0, 0),
    ],
)
def test_rouge_counts_chinese_by_characters(answer: str, reference: str, rouge1: float, rouge2: float) -> None:
    assert mean("rouge1", [answer], [reference]) == pytest.approx(rouge1)
    assert mean("rouge2", [answer], [reference]) == pytest.approx(rouge2)


def test_exact_match_leaves_white_space_at_the_ends_aside() -> None:
    assert mean("exact_match", [" a b\n", "a  b"], ["a b", "a b"]) == 50


def test_a_pattern_is_found_anywhere() -> None:
    metric = {"name": "order", "regex": r"#\d{3}\b"}
    assert mean(metric, ["order #123!", "order #12", "#1234"], [""] * 3) == pytest.approx(100 / 3)


FILE = """
def length(answer, reference):
    return len(answer)

def polite(answer, reference, messages):
    return "please" in answer and messages[0]["role"] == "user"

def some(answer, reference):
    return None if answer == "skip" else 1

def broken(answer, reference):
    raise KeyError("oh")

def text(answer, reference):
    return "high"

def one(answer):
    return 1
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return str(file)


def own(place: str) -> Any:
    return open_metrics(EvaluationSection(metrics=[{"name": "own", "function": place}]))["own"]


def test_functions_of_a_file_and_of_a_module_are_called(functions: str) -> None:
    asked = [{"role": "user", "content": "?"}]
    assert own(f"{functions}:length")("four", "", asked) == 4
    assert own(f"{functions}:polite")("yes please", "", asked) == 100
    assert own(f"{functions}:polite")("no", "", asked) == 0
    assert own(f"{functions}:some")("skip", "", asked) is None
    assert own("operator:eq")("a", "a", asked) == 100


def test_a_function_that_fails_or_gives_no_number_is_named(functions: str) -> None:
    with pytest.raises(RunError, match=r"`own` failed on the answer 'x': KeyError: 'oh'"):
        own(f"{functions}:broken")("x", "", [])
    with pytest.raises(RunError, match="`own` gave 'high'; it must give a number"):
        own(f"{functions}:text")("x", "", [])


def test_functions_that_can_not_be_had_are_told_together(functions: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import nowhere_to_be_found\n")
    places = [f"{functions}:none", f"{functions}:one", "gone.py:f", f"{bad}:f", "no_such_module:f"]
    metrics = [{"name": f"m{i}", "function": place} for i, place in enumerate(places)]
    with pytest.raises(ConfigError) as caught:
        open_metrics(EvaluationSection(metrics=metrics))
    words = ["there is no function `none`", "it takes 1 argument", "no such file: gone.py", "nowhere_to_be_found"]
    assert len(caught.value.problems) == 5
    for problem, word in zip(caught.value.problems, [*words, "No module named"], strict=True):
        assert word in problem
