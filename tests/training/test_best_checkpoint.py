"""Best checkpoint and early stopping, by the loss or by what the model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from helpers import tiny_config
from phinetune.api import train as api
from phinetune.config.run import RunConfig
from phinetune.config.section import Section
from phinetune.errors import ConfigError, RunError
from phinetune.training.best_checkpoint import EarlyStop, settle_best
from phinetune.training.objectives.sft import Sft
from phinetune.training.settings import read_settings

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def configured(chats: Path, folder: Path, evaluation: dict[str, Any], **training: Any) -> RunConfig:
    config = tiny_config(chats, folder, **training)
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


def settled(config: RunConfig, kind: type[Sft] = Sft) -> dict[str, Any]:
    return settle_best(read_settings(config.peft_config, config.training_config), config, kind(Section())).training


@pytest.mark.parametrize(
    ("name", "more"),
    [("loss", False), ("eval_perplexity", False), ("exact_match", True), ("stopped", True), ("repeating", False)],
)
def test_which_way_is_better_is_known(chats: Path, tmp_path: Path, name: str, more: bool) -> None:
    config = configured(chats, tmp_path, {}, metric_for_best_model=name, **EVALUATED)
    assert settled(config)["greater_is_better"] is more
    config = configured(chats, tmp_path, {}, metric_for_best_model=name, greater_is_better=not more, **EVALUATED)
    assert settled(config)["greater_is_better"] is not more


@pytest.mark.parametrize(("name", "more"), [("margin", True), ("divergence", False)])
def test_an_objectives_own_metrics_have_their_direction(chats: Path, tmp_path: Path, name: str, more: bool) -> None:
    class Own(Sft):
        metrics = ("loss", "margin", "divergence")
        less_is_better = ("divergence",)

    config = configured(chats, tmp_path, {}, metric_for_best_model=name, **EVALUATED)
    assert settled(config, Own)["greater_is_better"] is more
    with pytest.raises(ConfigError, match=f"no evaluation counts `{name}`"):
        settled(config)


def test_a_metric_that_is_not_counted_is_refused(chats: Path, tmp_path: Path) -> None:
    config = configured(chats, tmp_path, {}, metric_for_best_model="exact_macth", **EVALUATED)
    with pytest.raises(ConfigError, match="no evaluation counts `exact_macth`; did you mean `exact_match`"):
        settled(config)


@pytest.mark.parametrize("name", ["mean_token_accuracy", "eval_mean_token_accuracy"])
def test_trls_name_of_the_token_accuracy_is_ours(chats: Path, tmp_path: Path, name: str) -> None:
    config = configured(chats, tmp_path, {}, metric_for_best_model=name, **EVALUATED)
    assert settled(config)["metric_for_best_model"] == "token_accuracy"
    assert settled(config)["greater_is_better"] is True


@pytest.mark.parametrize("asked", [{"eval_strategy": "epoch"}, {"eval_strategy": "steps"}, {"eval_on_start": True}])
def test_an_evaluation_needs_held_out_chats(chats: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    config = tiny_config(chats, tmp_path, **asked)
    config.data.eval = None
    with pytest.raises(ConfigError, match=f"training_config.{next(iter(asked))}: there are no held-out chats to score"):
        settled(config)


def test_a_metric_without_evaluations_is_named(chats: Path, tmp_path: Path) -> None:
    config = configured(chats, tmp_path, {}, metric_for_best_model="loss")
    settings = settle_best(read_settings({}, config.training_config), config, Sft(Section()))
    assert "`metric_for_best_model` has no effect" in settings.notes[0]


def test_early_stopping_needs_evaluations(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no evaluation to go by; set data\.eval and"):
        settled(configured(chats, tmp_path, {"early_stopping_patience": 2}))
    settings = settled(configured(chats, tmp_path, {"early_stopping_patience": 2}, **EVALUATED))
    assert (settings["metric_for_best_model"], settings["greater_is_better"]) == ("loss", False)


@pytest.mark.parametrize(
    ("values", "greater", "threshold", "stops"),
    [
        ([3, 2, 1], False, 0, None),
        ([3, 2, 2, 2], False, 0, 4),
        ([3, 2, 4, 1, 2], False, 0, None),  # the fourth is a new best
        ([3, 2.9, 2.8], False, 0.5, 3),
        ([1, 5, 4, 3], True, 0, 4),
        ([1, 2, 3, 4], True, 0, None),
    ],
)
def test_it_stops_after_two_evaluations_without_a_better_one(
    tmp_path: Path, values: list[float], greater: bool, threshold: float, stops: int | None
) -> None:
    """As transformers' own callback decides, but read off the state alone."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, metric_for_best_model="exact_match", greater_is_better=greater
    )
    state = TrainerState()
    stopped = None
    for i, value in enumerate(values, 1):
        state.log_history += [{"loss": 1.0}, {"eval_exact_match": value}]
        control = TrainerControl()
        EarlyStop(2, threshold).on_evaluate(args, state, control)  # a new one each time, as after a resume
        if control.should_training_stop:
            stopped = i
            break
    assert stopped == stops


def test_the_best_step_by_a_metric_of_answers_is_what_the_run_holds(
    chats: Path, tmp_path: Path, console: Console
) -> None:
    """A function that likes the answers of step 2 best; two evaluations later the run stops."""
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef score(answer, reference):\n    calls.append(1)\n    return -abs((len(calls) - 1) // 3 - 0)\n"
    )
    metric = {"name": "liked", "function": f"{tmp_path / 'mine.py'}:score"}
    evaluation = {"metrics": [metric], "early_stopping_patience": 2, "max_new_tokens": 4}
    run = tmp_path / "run"
    training = {"metric_for_best_model": "liked", "load_best_model_at_end": True, "max_steps": 20, **EVALUATED}
    config = tiny_config(chats, run, **training)
    config.evaluation = config.evaluation.model_validate({**config.evaluation.model_dump(), **evaluation})
    made = api.train_config(config, console)
    summary = made.results["training"]
    assert summary["best"] == {"metric": "liked", "value": 0, "step": 2, "loaded": True}
    assert (summary["steps"], summary["stopped_early"]) == (6, True)
    best, final = (load_file(folder / "adapter_model.safetensors") for folder in (run / "checkpoint-2", run))
    assert all(torch.equal(best[key], final[key]) for key in final)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["eval_liked"] for entry in logged if "eval_liked" in entry] == [0, -1, -2]


def test_fixed_prompts_are_answered_at_every_evaluation(chats: Path, tmp_path: Path, console: Console) -> None:
    run = tmp_path / "run"
    config = tiny_config(chats, run, **EVALUATED)
    config.evaluation = config.evaluation.model_validate(
        {**config.evaluation.model_dump(), "fixed_prompts": ["How many?", "And now?"], "enabled": False}
    )
    api.train_config(config, console)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    wanted = [(step, prompt) for step in (2, 4, 6) for prompt in ("How many?", "And now?")]
    assert [(s["step"], s["prompt"]) for s in samples] == wanted
    assert set(samples[0]) == {"step", "prompt", "answer", "stopped"}


def test_by_default_they_are_the_first_held_out_prompts(tiny_run: Path) -> None:
    samples = [json.loads(line) for line in (tiny_run / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [3, 3, 3, 6, 6, 6]
    examples = json.loads((tiny_run / "results.json").read_text())["examples"]
    last = [(s["prompt"], s["reference"], s["answer"]) for s in samples[3:]]
    assert last == [(e["prompt"], e["reference"], e["answers"]["tuned"]) for e in examples]


SCORED = {"eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("training", "evaluation", "said"),
    [
        (
            {"greater_is_better": True},
            {},
            ["training_config: `greater_is_better` has no effect: `eval_strategy` is `no`"],
        ),
        (
            {"greater_is_better": False, **SCORED},
            {},
            ["training_config: `greater_is_better` has no effect: `metric_for_best_model` is not set"],
        ),
        ({"greater_is_better": False, **SCORED, "load_best_model_at_end": True}, {}, []),
        ({"greater_is_better": False, **SCORED, "lr_scheduler_type": "reduce_lr_on_plateau"}, {}, []),
        ({"greater_is_better": False, **SCORED}, {"early_stopping_patience": 2}, []),
        ({"greater_is_better": False, **SCORED, "metric_for_best_model": "loss"}, {}, []),
        (
            SCORED,
            {"early_stopping_threshold": 0.1},
            ["evaluation: `early_stopping_threshold` has no effect: `early_stopping_patience` is not set"],
        ),
        (SCORED, {"early_stopping_threshold": 0.1, "early_stopping_patience": 1}, []),
        (
            {},
            {"metrics_while_training": True, "fixed_prompts": ["Hi"]},
            [
                f"evaluation: `{key}` has no effect: training_config.eval_strategy is `no`"
                for key in ("metrics_while_training", "fixed_prompts")
            ],
        ),
        (
            SCORED,
            {"metrics_while_training": True, "fixed_prompts": 5, "generate": False},
            [
                f"evaluation: `{key}` has no effect: `generate` is false"
                for key in ("metrics_while_training", "fixed_prompts")
            ],
        ),
        (SCORED, {"metrics_while_training": True, "fixed_prompts": 5}, []),
        ({"eval_on_start": True}, {"metrics_while_training": True, "fixed_prompts": 5}, []),
        ({}, {"fixed_prompts": 3, "early_stopping_threshold": 0.0}, []),
        ({}, {"fixed_prompts": 0}, []),
    ],
)
def test_what_has_no_effect_on_evaluations_is_named(
    chats: Path, tmp_path: Path, training: dict[str, Any], evaluation: dict[str, Any], said: list[str]
) -> None:
    config = configured(chats, tmp_path, evaluation, **training)
    settings = settle_best(read_settings({}, config.training_config), config, Sft(Section()))
    assert settings.notes == said


def test_the_best_step_may_go_by_a_number_of_a_function_over_the_set(
    chats: Path, tmp_path: Path, console: Console
) -> None:
    """It is called with the held-out prompts alone, not with the fixed ones; a number that it lacks is told."""
    (tmp_path / "mine.py").write_text(
        "def count(answers, references):\n    assert all(references)\n    return {'of': len(answers), 'more': 1}\n"
    )
    metric = {"name": "mine", "compute": f"{tmp_path / 'mine.py'}:count", "less_is_better": ["of"], "resamples": 0}
    evaluation = {"metrics": [metric], "max_new_tokens": 4, "fixed_prompts": ["One?"]}
    training = {"load_best_model_at_end": True, "max_steps": 4, **EVALUATED}
    config = tiny_config(chats, tmp_path / "run", metric_for_best_model="mine_of", **training)
    config.evaluation = config.evaluation.model_validate({**config.evaluation.model_dump(), **evaluation})
    best = api.train_config(config, console).results["training"]["best"]
    assert (best["metric"], best["value"]) == ("mine_of", 3)
    config.training_config["metric_for_best_model"] = "mine_missing"
    with pytest.raises(RunError, match=r"this evaluation has no `mine_missing`; it has .*mine_of, mine_more"):
        api.train_config(config, console, overwrite=True)
