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
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.load import Loaded
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.config.evaluation import EvaluationSection
from phinetune.data.prepare import build_sets
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.copies import SetKeys
from phinetune.data.prepare.encode_answers import JudgedRows
from phinetune.data.prepare.report import DataReport
from phinetune.data.prepare.shared_rows import Shared
from phinetune.engine.examples import Encoded
from phinetune.engine.generate import Answer
from phinetune.engine.scoring import score_rows
from phinetune.evaluation.answering import Answers
from phinetune.evaluation.preferences import score_pairs, win_rate, worth_imitating

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


JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]


@pytest.mark.parametrize("small", [True, False], ids=["memory", "disk"])
def test_answers_that_are_not_good_are_no_references(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are they lost, won or hard: the verdict is on the others alone, each with what belongs to it."""
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build_sets, "SMALL", 100 if small else 1)
    tagged = [{**row, "topic": str(i)} for i, row in enumerate(JUDGED)]
    section = DataSection(train=str(write_jsonl(tmp_path / "judged.jsonl", tagged)), tag="topic")
    held_out = build_chats(JudgedRows(section, make_encoder(byte_tokenizer(300)), None)).train
    kept = worth_imitating(held_out)
    wanted = [i for i in range(12) if i % 3]
    assert [(row.values or {})["label"] for row in kept.encoded] == [1.0] * len(wanted)
    assert [chat[-1]["content"] for chat in kept.chats] == [PAIRS[i]["chosen"] for i in wanted]
    assert list(kept.places) == list(range(len(wanted)))
    assert list(kept.tags) == list(map(str, wanted))
    assert len(held_out) == 12
    assert worth_imitating(kept) is kept


def test_the_copies_of_a_part_are_those_of_the_whole() -> None:
    rows = [Encoded([i, i], [i, i]) for i in range(5)]
    keys = SetKeys([b"a", b"b", b"c", b"d", b"e"], [None] * 5)
    whole = ChatSet([], rows, DataReport("a"), where=list("abcde"), keys=keys, shared=Shared(5, 2, 0, 0, copied=(1, 3)))
    part = whole.at([0, 3, 4])
    assert part.where == ["a", "d", "e"]
    assert part.keys
    assert part.keys.rows == [b"a", b"d", b"e"]
    assert part.shared
    assert part.shared.copied == (1,)


def test_a_run_over_judged_rows_is_measured_by_its_good_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "save_strategy": "no"}
    held = write_jsonl(tmp_path / "held.jsonl", JUDGED[:6])
    results = train(
        model=TINY,
        data={"train": str(write_jsonl(tmp_path / "judged.jsonl", JUDGED[6:])), "eval": str(held)},
        objective="kto",
        training_config=training,
        evaluation={"max_new_tokens": 6, "win_rate_by": "chrf"},
        console=Console(quiet=True),
    ).results
    assert results["differences"]["loss"]["rows"] == 4
    assert [one["reference"] for one in results["examples"]] == [PAIRS[i]["chosen"] for i in (1, 2, 4, 5)]
    assert sum(results["win_rate"][key] for key in ("won", "lost", "even")) == 4


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
