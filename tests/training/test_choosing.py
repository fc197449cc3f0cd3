"""What a run chooses where nothing is given, what of that is written down, and what becomes of given values."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import TINY, chat, write_jsonl
from phinetune.api.train import train_config
from phinetune.config.run import RunConfig, make_config
from phinetune.screen.console import Console
from phinetune.training import prepare as prepare_module
from phinetune.training.prepare import PreparedRun, prepare_run, settle


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [chat(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(100)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "hundred.jsonl", rows)


def config_of(data: Any, out: Path, held_out: Any = 0.1, peft: Any = None, **training: Any) -> RunConfig:
    tree = {
        "model": {"path": TINY},
        "data": {"train": data if isinstance(data, list) else str(data), "eval": held_out},
        "peft_config": peft or {},
        "training_config": {"output_dir": str(out), **training},
        "evaluation": {"enabled": False, "fixed_prompts": 0},
    }
    return make_config(tree)


def prepared(data: Any, out: Path, **changes: Any) -> PreparedRun:
    return prepare_run(settle(config_of(data, out, **changes)))


def remarks(run: PreparedRun) -> dict[str, str]:
    return {choice.key.partition(".")[2]: choice.why for choice in run.choices if choice.given}


def test_all_that_is_left_open_gets_a_number_and_a_reason(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path)
    assert {key.partition(".")[2]: value for key, value in run.chosen.items()} == {
        "r": 16,
        "lora_alpha": 32,
        "max_length": 1024,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 9,
        "eval_strategy": "steps",
        "eval_steps": 18,
        "save_steps": 18,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    assert run.steps.count == 180
    assert all(choice.why for choice in run.choices)
    args = run.args
    assert (args.learning_rate, args.warmup_steps, args.eval_steps, args.save_steps) == (3e-3, 9, 18, 18)
    assert (args.load_best_model_at_end, run.settings.auto) == (True, frozenset())


def test_auto_is_the_same_as_leaving_out(hundred: Path, tmp_path: Path) -> None:
    keys = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
    more = ("warmup_steps", "max_length", "eval_steps", "eval_strategy", "save_steps")
    named = prepared(hundred, tmp_path, peft={"r": "auto", "lora_alpha": "auto"}, **dict.fromkeys(keys + more, "auto"))
    assert named.chosen == prepared(hundred, tmp_path).chosen
    assert "auto" not in {**named.config.peft_config, **named.config.training_config}.values()


def test_older_names_of_keys_may_be_auto(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path, max_seq_length="auto", warmup_ratio="auto")
    assert (run.config.training_config["max_length"], run.args.warmup_steps) == (1024, 9)
    assert not {"max_seq_length", "warmup_ratio"} & run.config.training_config.keys()


def test_a_given_value_is_obeyed_and_one_far_from_its_rule_gets_a_line(hundred: Path, tmp_path: Path) -> None:
    given = {"learning_rate": 2e-5, "num_train_epochs": 10, "per_device_train_batch_size": 45, "warmup_steps": 1}
    run = prepared(hundred, tmp_path, peft={"r": 2, "lora_alpha": 4}, **given)
    assert not {f"training_config.{key}" for key in given} & run.chosen.keys()
    assert (run.args.learning_rate, run.args.num_train_epochs, run.settings.peft["r"]) == (2e-5, 10, 2)
    told = remarks(run)
    assert told["learning_rate"] == (
        "some 200 times below the rule's 0.003 for hidden size 32; expect little to be learnt in 20 steps"
    )
    assert told["num_train_epochs"] == "the rule's is 4 for 90 rows; expect rows to be learnt by heart"
    assert told["per_device_train_batch_size"].startswith("45 rows a step are some 20 times above the rule's 2")
    near = prepared(hundred, tmp_path, learning_rate=2e-3, num_train_epochs=2, per_device_train_batch_size=4)
    assert remarks(near) == {}


@pytest.mark.parametrize(
    ("peft", "training", "key", "words"),
    [
        ({"r": 64, "lora_alpha": 256}, {}, "lora_alpha", "some 8 times above the 32 that"),
        ({"r": 64, "lora_alpha": 32, "use_rslora": True}, {}, "lora_alpha", "some 8 times above the 4 that"),
        ({"r": 64, "lora_alpha": 32}, {}, "", ""),
        ({"r": 2, "lora_alpha": 4}, {"learning_rate": 3e-3}, "", ""),  # who gives a rate has chosen both
        ({}, {"gradient_accumulation_steps": 64}, "gradient_accumulation_steps", "64 rows a step are some 30 times"),
        ({}, {"gradient_accumulation_steps": 4}, "", ""),
        ({}, {"warmup_steps": 100}, "warmup_steps", "the learning rate still rises in 56% of 180 steps"),
        ({}, {"warmup_steps": 500}, "warmup_steps", "the learning rate still rises in 100% of 180 steps"),
        ({}, {"warmup_ratio": 0.9}, "warmup_steps", "the learning rate still rises in 90% of 180 steps"),
        ({}, {"warmup_steps": 20}, "", ""),
    ],
)
def test_other_values_far_from_their_rules_get_a_line(
    hundred: Path, tmp_path: Path, peft: dict[str, Any], training: dict[str, Any], key: str, words: str
) -> None:
    told = remarks(prepared(hundred, tmp_path, peft=peft, **training))
    assert list(told) == ([key] if key else [])
    assert all(why.startswith(words) for why in told.values())


def test_the_reason_for_a_batch_counts_what_a_step_really_has(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path, gradient_accumulation_steps=4)
    (why,) = [one.why for one in run.choices if one.key.endswith("per_device_train_batch_size")]
    assert why == "4 rows a step, as gradient_accumulation_steps is 4"


def test_nothing_held_out_no_evaluations(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path, held_out=None)
    assert (run.args.eval_strategy, run.args.load_best_model_at_end, run.args.save_steps) == ("no", False, 50)


@pytest.mark.parametrize("given", [{"eval_strategy": "no"}, {"do_eval": False}, {"eval_steps": 5}])
def test_who_wants_no_evaluations_gets_none(hundred: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    run = prepared(hundred, tmp_path, **given)
    assert (run.args.eval_strategy, run.args.load_best_model_at_end) == ("no", False)


def test_evaluations_meet_given_checkpoints_and_the_best_is_kept_if_asked(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path, save_steps=40)
    assert (run.args.eval_steps, run.args.save_steps, run.args.load_best_model_at_end) == (20, 40, False)
    assert run.args.save_total_limit is None
    asked = prepared(hundred, tmp_path, save_steps=40, load_best_model_at_end=True)
    assert (asked.args.eval_steps, asked.args.load_best_model_at_end) == (20, True)


def test_checkpoints_of_each_epoch_are_scored(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path, save_strategy="epoch")
    assert (run.args.eval_strategy, run.args.save_strategy) == ("epoch", "epoch")


def test_who_wants_the_best_gets_evaluations_that_meet_the_checkpoints(hundred: Path, tmp_path: Path) -> None:
    run = prepared(hundred, tmp_path, load_best_model_at_end=True, logging_steps=7)
    assert (run.args.eval_strategy, run.args.eval_steps, run.args.save_steps) == ("steps", 18, 18)


def test_a_metric_or_patience_asks_for_evaluations_whatever_they_take(hundred: Path, tmp_path: Path) -> None:
    few = {"max_steps": 4, "per_device_train_batch_size": 1}
    assert prepared(hundred, tmp_path, held_out=0.5, **few).args.eval_strategy == "no"
    config = config_of(hundred, tmp_path, 0.5, **few)
    config.evaluation.early_stopping_patience = 2
    run = prepare_run(settle(config))
    assert (run.args.eval_strategy, run.args.eval_steps, len(run.scored or ())) == ("steps", 1, 32)
    config.evaluation.rows_while_training = 50
    run = prepare_run(settle(config))
    assert (run.args.eval_strategy, run.args.eval_steps, run.scored) == ("steps", 2, None)


def test_config_and_start_have_the_numbers_and_resuming_takes_them(hundred: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    console = Console(quiet=True)
    config = config_of(hundred, out, max_steps=8, save_steps=4)
    train_config(config, console)
    written = yaml.safe_load((out / "config.yaml").read_text())
    start = json.loads((out / "start.json").read_text())
    assert written["training_config"]["learning_rate"] == 3e-3
    assert written["peft_config"] == {"r": 16, "lora_alpha": 32}
    assert start["chosen"]["training_config.learning_rate"] == 3e-3
    assert {"key", "value", "why", "given"} == start["settings"][0].keys()
    # It goes on with what it chose, even if the rules would choose otherwise by now.
    start["chosen"]["peft_config.r"] = 16
    start["chosen"]["training_config.warmup_steps"] = 0
    (out / "start.json").write_text(json.dumps(start))
    (out / "results.json").unlink()
    run = train_config(config_of(hundred, out, max_steps=8, save_steps=4), console, resume=True)
    assert json.loads((out / "start.json").read_text())["chosen"] == start["chosen"]
    assert run.path == out


def test_rows_that_have_little_in_common_get_a_lower_rate_and_two_epochs(hundred: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase + string.digits, k=12)) for _ in range(80)]
    unlike = write_jsonl(tmp_path / "unlike.jsonl", [chat(f"Say {i}", one) for i, one in enumerate(words)])
    run = prepared(unlike, tmp_path / "run")
    ground = prepare_module._ground(run)
    assert ground.unlike
    assert run.args.num_train_epochs == 2
    assert run.args.learning_rate == 1.5e-3  # half of 3e-3
    told = {choice.key: choice.why for choice in run.choices}
    share = f"{ground.in_one_row:.0%} of the pairs of tokens stand in one row only"
    assert told["training_config.num_train_epochs"].endswith(f"but these have little in common ({share})")
    assert f"half of it: {share}" in told["training_config.learning_rate"]

    few = write_jsonl(tmp_path / "few.jsonl", [chat(f"Say {i}", one) for i, one in enumerate(words[:50])])
    assert prepare_module._ground(prepared(few, tmp_path / "run")).in_one_row is None  # 45 rows tell too little
    for steps, rate in ({"num_train_epochs": 1}, 3e-3), ({"max_steps": 36}, 3e-3), ({"max_steps": 80}, 1.5e-3):
        assert prepared(unlike, tmp_path / "run", **steps).args.learning_rate == rate
    alike = [{"path": str(hundred), "weight": 2}, str(hundred)]
    assert prepare_module._ground(prepared(alike, tmp_path / "run")).in_one_row < 0.1
    twice = prepare_module._ground(prepared([{"path": str(unlike), "weight": 2}], tmp_path / "run"))
    assert twice.in_one_row == pytest.approx(ground.in_one_row, abs=0.05)
    pairs = [{"prompt": f"Say {i}", "chosen": one, "rejected": one[::-1]} for i, one in enumerate(words)]
    config = config_of(write_jsonl(tmp_path / "pairs.jsonl", pairs), tmp_path / "dpo")
    config = config.model_copy(update={"objective": make_config({"objective": "dpo"}).objective})
    assert prepare_module._ground(prepare_run(settle(config))).in_one_row is None


def test_who_asks_for_the_best_has_three_looks_or_more(hundred: Path, tmp_path: Path) -> None:
    looks = []
    for epochs in range(1, 9):
        run = prepared(hundred, tmp_path, held_out=0.4, num_train_epochs=epochs, metric_for_best_model="loss")
        looks.append(run.steps.count // run.args.eval_steps)
    assert min(looks) >= 3, looks
