"""After a run over pairs: how often each model prefers the chosen answer, how long answers are, and which win."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from helpers import TINY, write_jsonl
from phinetune import evaluate, train
from phinetune.checkpoints.load import Loaded
from phinetune.config.evaluation import EvaluationSection
from phinetune.engine.examples import Encoded
from phinetune.engine.generate import Answer
from phinetune.engine.scoring import score_rows
from phinetune.evaluation.answering import Answers
from phinetune.evaluation.preferences import score_pairs, win_rate

PAIRS = [
    {
        "prompt": f"How many are {i} and {i}?",
        "chosen": f"They are {2 * i}, no more.",
        "rejected": f"No{'!' * (i % 3)} {i}",
    }
    for i in range(12)
]


def test_what_a_model_prefers_is_what_it_finds_likelier(tiny: Loaded) -> None:
    """Whole answers, and by their mean token; the labels in a prompt, which orpo has, do not count."""
    prompt, short, long = [5, 6, 7], [8, 9], [8, 9, 10, 11, 12, 13]
    done: list[int] = []
    rows = [
        Encoded(prompt + a + prompt + b, prompt + a + [-100] * 3 + b, (3 + len(a), 3 + len(b)))
        for a, b in ((short, long), (long, short))
    ]
    scores, preferred = score_pairs(tiny.model, rows, None, done.append)
    alone = score_rows(tiny.model, [Encoded(prompt + one, [-100] * 3 + one) for one in (short, long)])
    assert [score.tokens for score in scores] == [2, 6]
    assert preferred["prefers_chosen"].tolist() == [100, 0]
    by_token = alone[0].loss < alone[1].loss
    assert preferred["prefers_chosen_a_token"].tolist() == [100.0 * by_token, 100.0 * (not by_token)]
    assert sum(done) == 2


def test_a_win_counts_one_and_an_even_one_half() -> None:
    def answers(*numbers: float) -> Answers:
        return Answers([Answer("a b", 2, True, (1, 2)) for _ in numbers], {"chrf": np.array(numbers)})

    found = win_rate("chrf", answers(1, 2, 3, 4, np.nan), answers(2, 3, 3, 0, 9), True)
    assert found
    assert (found["won"], found["lost"], found["even"], found["rate"]) == (2, 1, 1, 62.5)
    assert 0 <= found["low"] < 62.5 < found["high"] <= 100
    turned = win_rate("chrf", answers(1, 2), answers(2, 3), False)
    assert turned
    assert turned["rate"] == 0
    assert win_rate("bleu", answers(1), answers(2), True) is None


def test_a_run_over_pairs_tells_what_became_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    shown = Console(file=io.StringIO(), width=140)
    run = tmp_path / "run"
    training = {"output_dir": str(run), "max_steps": 8, "per_device_train_batch_size": 3, "learning_rate": 2e-2}
    given: dict[str, Any] = {
        "model": TINY,
        "data": {"train": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS)), "eval": 0.25},
        "objective": "dpo",
        "training_config": {**training, "logging_steps": 1, "save_strategy": "no"},
        "evaluation": {"max_new_tokens": 6, "win_rate_by": "chrf"},
    }
    results = train(**given, console=shown).results
    base, tuned = results["evaluation"]["base"], results["evaluation"]["tuned"]
    assert tuned["prefers_chosen_a_token"] >= base["prefers_chosen_a_token"]
    assert results["differences"]["prefers_chosen"]["rows"] == 3
    assert base["answer_words"] > 0
    assert results["win_rate"]["won"] + results["win_rate"]["lost"] + results["win_rate"]["even"] == 3
    assert results["examples"][0]["reference"].startswith("They are")
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "prefers the chosen answer %",
        "Words an answer: base",
        "Win rate: tuned wins",
        "margin 0.",
        "right ",
    ):
        assert words in text
    page = (run / "report.html").read_text()
    assert "Win rate: tuned wins" in page
    assert "Words an answer: base" in page
    again = evaluate(run, console=Console(quiet=True))
    assert json.loads(json.dumps(again.results["tuned"]["prefers_chosen"])) == tuned["prefers_chosen"]
    assert "prefers" in (run / "README.md").read_text()


def test_a_run_that_went_on_is_compared_with_its_start_too(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a rate of zero the tuned model is its start, which is another model than the base."""
    shown = Console(file=io.StringIO(), width=140)
    first, run = shutil.copytree(tiny_run, tmp_path / "first"), tmp_path / "run"
    training = {"output_dir": str(run), "max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    results = train(
        model={"adapter": str(first), "dtype": "float32"},
        data={"train": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS)), "eval": 0.25},
        objective="dpo",
        training_config=training,
        evaluation={"max_new_tokens": 6, "win_rate_by": "chrf"},
        console=shown,
    ).results
    base, tuned = results["evaluation"]["base"], results["evaluation"]["tuned"]
    since = results["since_start"]
    assert since["evaluation"] == {"start": tuned, "tuned": tuned}
    assert since["differences"]["loss"]["low"] == since["differences"]["loss"]["high"] == 0
    assert since["win_rate"]["rate"] == 50
    assert "tuned wins 50% against start by chrf" in shown.file.getvalue()  # type: ignore[attr-defined]
    assert "Since the start" in (run / "report.html").read_text()
    weights = load_file(first / "adapter_model.safetensors")
    save_file({name: 2 * one for name, one in weights.items()}, run / "adapter_model.safetensors")
    other = evaluate(run, console=Console(quiet=True), record=False)
    assert other.since_start
    assert other.since_start.results["start"]["loss"] == tuned["loss"] != base["loss"] == other.results["base"]["loss"]
    assert other.since_start.results["tuned"] == other.results["tuned"] != tuned
    shutil.rmtree(first)
    again = evaluate(run, console=Console(quiet=True), record=False)
    assert again.since_start is None
    assert again.results == other.results, "and its weights are those of the run after the start was looked at"
    assert f"{first.resolve()}, is not there any more, so it is not compared with" in caplog.text


def test_the_win_rate_needs_a_metric_that_is_counted() -> None:
    with pytest.raises(ValueError, match="win_rate_by: `politeness` is none of `metrics`"):
        EvaluationSection(win_rate_by="politeness")
