"""A candidate is the run that its numbers, given by hand, would be; the base it leaves is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_config, train_only
from phinetune.training.candidate import SharedBase, can_be_shared, candidate
from phinetune.training.prepare import PreparedRun, prepare_rows, settle
from phinetune.training.run import load_for, open_place, train_run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def trained(run: PreparedRun, base: SharedBase) -> dict[str, torch.Tensor]:
    loaded = base.take(run)
    made = train_run(run, open_place(run.config), loaded=loaded)
    base.give_back(run, loaded, made.model)
    return adapter(made.folder.path)


def test_candidates_on_one_base_are_the_runs_with_these_numbers_given(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run", eval_strategy="steps", eval_steps=3)
    del config.training_config["learning_rate"]
    rows, base = prepare_rows(settle(config)), SharedBase()
    for number, values in enumerate([{"learning_rate": 3e-2}, {"learning_rate": 1e-2, "r": 8}, {"max_steps": 4}]):
        run = candidate(rows, values, tmp_path / f"candidate-{number}")
        tensors = trained(run, base)
        assert base._loaded, "the base is kept"
        alone = tiny_config(chats, tmp_path / f"alone-{number}", eval_strategy="steps", eval_steps=3)
        del alone.training_config["learning_rate"]
        alone.training_config.update({key: value for key, value in values.items() if key != "r"})
        alone.peft_config.update({key: value for key, value in values.items() if key == "r"})
        wanted = adapter(train_only(alone).folder.path)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_the_base_is_untouched_when_it_is_given_back(chats: Path, tmp_path: Path) -> None:
    run = candidate(prepare_rows(settle(tiny_config(chats, tmp_path / "run"))), {}, tmp_path / "one")
    base = SharedBase()
    trained(run, base)
    fresh = load_for(run).model
    kept = base.take(run).model
    assert [name for name, _ in kept.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert [type(one) for one in kept.modules()] == [type(one) for one in fresh.modules()]
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(
    "peft", [{"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}, {"use_dora": True}, {}]
)
def test_an_adapter_that_changes_its_base_gets_one_of_its_own(
    chats: Path, tmp_path: Path, peft: dict[str, Any]
) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.peft_config.update(peft)
    run = candidate(prepare_rows(settle(config)), {}, tmp_path / "one")
    assert can_be_shared(run) == (peft in ({}, {"use_dora": True}))
