"""A metric that the held-out rows can't give is told before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import chat, tiny_config, write_jsonl
from phinetune.api.plan import plan_config
from phinetune.api.train import train_config
from phinetune.chats.encoder import ChatEncoder
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError
from phinetune.metric_table import METRICS
from phinetune.screen.console import Console


def train(config: RunConfig) -> Any:
    return train_config(config, Console(quiet=True))


def chosen_by(name: str, file: Path, folder: Path) -> RunConfig:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    return tiny_config(file, folder / "run", metric_for_best_model=name, **steps)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("training.run", "planning.probe"):
        monkeypatch.setattr(f"phinetune.{place}.load_base", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
@pytest.mark.parametrize("name", ["json_valid", "eval_json_fields"])
def test_json_is_not_measured_where_no_answer_is_json(
    chats: Path, tmp_path: Path, no_weights: None, way: Any, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"`{name.removeprefix('eval_')}` has no number for any of the 3 held-out"):
        way(chosen_by(name, chats, tmp_path))


@pytest.mark.parametrize("way", [train, plan_config], ids=["train", "plan"])
def test_rows_that_are_no_chats_are_not_answered(tmp_path: Path, no_weights: None, way: Any) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{i} and {i} are {2 * i}."} for i in range(12)])
    with pytest.raises(ConfigError, match="`exact_match` is counted from answers, and the held-out rows are no chats"):
        way(chosen_by("exact_match", texts, tmp_path))


def test_answers_that_are_switched_off_are_told(chats: Path, tmp_path: Path, no_weights: None) -> None:
    config = chosen_by("rouge_l", chats, tmp_path)
    config.evaluation.generate = False
    with pytest.raises(ConfigError, match="no evaluation counts `rouge_l`"):
        train(config)


def test_what_the_rows_give_is_counted(tmp_path: Path) -> None:
    rows = [chat(f"{i}?", '{"answer": ' + str(i) + "}") for i in range(12)]
    made = train(chosen_by("json_valid", write_jsonl(tmp_path / "json.jsonl", rows), tmp_path))
    assert made.results["training"]["best"]["metric"] == "json_valid"


@pytest.mark.parametrize(
    ("names", "generate", "told"),
    [
        (["json_valid", "exact_match"], True, ["json_valid"]),
        (["json_fields", "json_valid"], True, ["json_fields", "json_valid"]),
        (["exact_match", {"name": "sum", "regex": "nothing"}], True, []),
        (["json_valid"], False, []),
        (None, True, []),  # by default all are counted that can be
    ],
)
def test_a_named_metric_without_a_number_is_told_at_the_start(
    chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: Any, generate: bool, told: list[str]
) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.evaluation.generate = generate
    if names:
        config.evaluation.metrics = names
    plan_config(config, probe=False)
    assert {name for name in METRICS if f"evaluation.metrics: `{name}` has no number" in caplog.text} == set(told)


def test_the_questions_are_rendered_once(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, prompt_ids = [], ChatEncoder.prompt_ids

    def noted(encoder: ChatEncoder, chat: Any) -> Any:
        asked.append(chat)
        return prompt_ids(encoder, chat)

    monkeypatch.setattr(ChatEncoder, "prompt_ids", noted)
    config = chosen_by("exact_match", chats, tmp_path)
    config.evaluation.metrics = ["exact_match"]
    plan_config(config, probe=False)
    assert len(asked) == 3
