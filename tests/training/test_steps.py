"""Steps and tokens counted beforehand are those of the run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl import SFTConfig

from helpers import tiny_config, train_only
from phinetune.errors import ConfigError
from phinetune.planning.plan import make_plan
from phinetune.planning.probe import sample_batch
from phinetune.training.steps import count_steps


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 5},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2},
        {"max_steps": -1, "num_train_epochs": 2, "packing": True, "max_length": 200, "per_device_train_batch_size": 1},
    ],
)
def test_a_run_takes_the_steps_of_its_plan(chats: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    config = tiny_config(chats, tmp_path / "run", **training)
    config.evaluation.enabled = False
    plan = make_plan(config, probe=False)
    made = train_only(config)
    assert plan.steps.count == made.summary["steps"]
    assert plan.trainable == made.summary["trainable_parameters"]
    assert plan.steps.tokens == made.summary["tokens"]


@pytest.mark.parametrize("seed", [0, 7])
def test_the_largest_batch_is_that_of_the_run(chats: Path, tmp_path: Path, seed: int) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=9, logging_steps=1, seed=seed, eval_strategy="no")
    config.evaluation.enabled = False
    plan = make_plan(config, probe=False)
    train_only(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = [0, *(json.loads(line)["tokens"] for line in lines)]
    batches = [after - before for before, after in pairwise(seen)]
    assert len(batches) == 9
    assert plan.steps.largest == max(batches)


def args(**training: Any) -> SFTConfig:
    return SFTConfig("unused", report_to=[], use_cpu=True, bf16=False, **training)


def test_the_largest_batch_lies_between_mean_and_longest() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 5000)
    steps = count_steps(lengths, args(per_device_train_batch_size=8, num_train_epochs=1))
    assert steps.count == 625
    assert steps.mean == pytest.approx(8 * lengths.mean())
    assert steps.mean < steps.largest < 8 * lengths.max()
    few = count_steps(lengths, args(per_device_train_batch_size=8, max_steps=3))
    assert few.largest < steps.largest
    whole = count_steps(lengths[:6], args(per_device_train_batch_size=8, num_train_epochs=1))
    assert whole.largest == lengths[:6].sum()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_micro_batches_that_are_not_full_are_dropped_in_the_plan_too(
    chats: Path, tmp_path: Path, accumulation: int
) -> None:
    more = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    config = tiny_config(chats, tmp_path / "run", max_steps=-1, dataloader_drop_last=True, **more)
    config.evaluation.enabled = False
    plan = make_plan(config, probe=False)
    summary = train_only(config).summary
    assert (plan.steps.count, plan.steps.tokens) == (summary["steps"], summary["tokens"])


@pytest.mark.parametrize("way", [train_only, make_plan])
def test_no_full_micro_batch_at_all_is_refused(chats: Path, tmp_path: Path, way: Any) -> None:
    config = tiny_config(chats, tmp_path / "run", dataloader_drop_last=True, per_device_train_batch_size=10)
    with pytest.raises(ConfigError, match="9 rows fill no micro-batch of 10, so nothing would be trained"):
        way(config)


def test_endless_epochs_are_counted_without_drawing_them_all() -> None:
    steps = count_steps(np.arange(1, 1001), args(per_device_train_batch_size=1000, max_steps=10**12))
    assert steps.count == 10**12
    assert steps.tokens == 10**12 * 500500
    assert steps.mean == 500500


def test_a_stream_is_as_long_as_its_steps() -> None:
    steps = count_steps(np.full(100, 50), args(per_device_train_batch_size=4, max_steps=1000), endless=True)
    assert (steps.count, steps.tokens) == (1000, 1000 * 4 * 50)


def test_the_sampled_batch_is_about_as_long_as_the_mean() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 400)
    places = sample_batch(lengths, 8)
    assert len(set(places)) == 8
    assert lengths[places].sum() == pytest.approx(8 * lengths.mean(), rel=0.05)
    assert sorted(sample_batch(lengths[:3], 8)) == [0, 1, 2]
