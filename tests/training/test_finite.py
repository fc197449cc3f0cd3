"""Numbers that are not finite reach neither the adapter nor a checkpoint, and a sentence names the rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers import tiny_config
from phinetune.config.engine import EngineSection
from phinetune.config.run import RunConfig
from phinetune.errors import RunError
from phinetune.training.finite import FiniteSteps, check_finite
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.run import TrainedRun, open_place, train_run

FORMS = {"fast": {}, "plain": {"kind": "plain"}}


def spoiling(value: float, steps: set[int], batches: int = 1) -> Callable[[PeftModel], None]:
    """What gives one tensor a gradient that is not finite at these steps, as an overflow in a backward does."""

    def begin(model: PeftModel) -> None:
        seen = [0]

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            seen[0] += 1
            return torch.full_like(grad, value) if (seen[0] - 1) // batches + 1 in steps else grad

        next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(spoil)

    return begin


class Overflows(TrainerCallback):
    """An update after which one tensor is not finite, as one that overflows."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] = float("inf")


class BadLoss(TrainerCallback):
    """A step whose loss is no number, as that of a row that overflows."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            self.spoiled = next(p for n, p in model.named_parameters() if "lora_B" in n)
            self.before = self.spoiled.detach().clone()
            with torch.no_grad():
                self.spoiled.fill_(float("nan"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.spoiled.copy_(self.before)


class Killed(TrainerCallback):
    """A run that dies after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(
    config: RunConfig,
    begin: Callable[[PeftModel], None] = lambda model: None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainedRun:
    place = open_place(config, resume=resume)
    return train_run(prepare_run(settle(config)), place, on_start=begin, callbacks=callbacks)


def with_engine(config: RunConfig, **engine: Any) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def is_finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "adapter_model.safetensors").values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(
    chats: Path, tmp_path: Path, form: str, value: float
) -> None:
    config = tiny_config(chats, tmp_path / "run", save_strategy="steps", save_steps=2)
    with pytest.raises(RunError) as caught:
        run(with_engine(config, **FORMS[form]), spoiling(value, {4}))
    (problem,) = caught.value.problems
    assert "norm became" in problem
    assert "at step 4" in problem
    assert "on_nonfinite: skip" in problem
    assert "How many are" in problem  # the rows
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert is_finite(tmp_path / "run" / "checkpoint-2")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_of_several_micro_batches_all_rows_are_shown_or_those_with_the_bad_loss(chats: Path, tmp_path: Path) -> None:
    training = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 2}
    with pytest.raises(RunError, match=r"norm became nan at step 2, .* rows began: '.*' \| '"):
        run(tiny_config(chats, tmp_path / "run", **training), spoiling(float("nan"), {3}))
    steps = FiniteSteps(EngineSection(), str)
    for number, loss in enumerate([1.0, float("nan"), 2.0, float("inf")]):
        steps.saw({"input_ids": torch.tensor([[number]])}, torch.tensor(loss))
    steps.measured(None)  # of a library that tells none
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState()
    with pytest.raises(RunError, match=r"the loss became nan at step 1, .* rows began: 'tensor\(\[1\]\)'$"):
        steps.on_pre_optimizer_step(args, state, TrainerControl())


@pytest.mark.parametrize("form", FORMS)
def test_a_skipped_step_changes_nothing_and_is_counted(chats: Path, tmp_path: Path, form: str) -> None:
    """The optimizer's state is that of a run without the step, too."""
    config = with_engine(tiny_config(chats, tmp_path / "run", learning_rate=1e-2), on_nonfinite="skip", **FORMS[form])
    weights: list[dict[str, torch.Tensor]] = []

    def keep(model: PeftModel) -> None:
        spoiling(float("nan"), {2, 3})(model)
        first = next(p for n, p in model.named_parameters() if "lora_A" in n)
        first.register_hook(lambda grad: weights.append({"A": first.detach().clone()}))

    trained = run(config, keep)
    assert trained.summary["skipped_steps"] == [2, 3]
    assert trained.summary["steps"] == 6
    assert torch.equal(weights[1]["A"], weights[2]["A"])
    assert torch.equal(weights[2]["A"], weights[3]["A"])
    assert not torch.equal(weights[3]["A"], weights[4]["A"])
    assert is_finite(tmp_path / "run")
    norms = [json.loads(line)["grad_norm"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [norm is None for norm in norms] == [False, True, True, False, False, False]


@pytest.mark.parametrize(("bad", "finite"), [(1, [False, True, True]), (3, [True, False, True])])
@pytest.mark.parametrize("form", FORMS)
def test_only_the_line_with_the_skipped_loss_has_none(
    chats: Path, tmp_path: Path, form: str, bad: int, finite: list[bool]
) -> None:
    """A line is of two steps, and a checkpoint in the middle of the second one keeps what was added up."""
    training = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    config = with_engine(tiny_config(chats, tmp_path / "run", **training), on_nonfinite="skip", **FORMS[form])
    file = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[BadLoss(bad), Killed(5)])
    assert [json.loads(line)["loss"] is not None for line in file.read_text().splitlines()] == finite[:2]
    assert run(config, resume=True).summary["skipped_steps"] == [bad]
    assert [json.loads(line)["loss"] is not None for line in file.read_text().splitlines()] == finite


def test_no_more_steps_are_skipped_than_the_limit_and_a_resume_counts_on(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run", save_strategy="steps", save_steps=2)
    config = with_engine(config, on_nonfinite="skip", nonfinite_limit=2)
    with pytest.raises(RunError, match="at step 5; 3 steps had to be skipped, and engine"):
        run(config, spoiling(float("nan"), {1, 3, 5}))
    with pytest.raises(RunError, match="at step 6; 3 steps had to be skipped"):  # steps 1 and 3 were before
        run(config, spoiling(float("nan"), {2}), resume=True)
    trained = run(config, resume=True)
    assert trained.summary["skipped_steps"] == [1, 3]


def test_an_adapter_that_is_spoiled_already_is_not_skipped_on(chats: Path, tmp_path: Path) -> None:
    config = with_engine(tiny_config(chats, tmp_path / "run"), on_nonfinite="skip")
    with pytest.raises(RunError, match=r"the adapter is not finite before step 3 \(.*lora_A"):
        run(config, callbacks=[Overflows(2)])


@pytest.mark.parametrize("training", [{}, {"save_strategy": "steps", "save_steps": 2}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_last_update_that_is_not_finite_is_not_saved(
    chats: Path, tmp_path: Path, form: str, training: dict[str, Any]
) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=4, **training)
    with pytest.raises(RunError, match="the adapter is not finite after step 4"):
        run(with_engine(config, **FORMS[form]), callbacks=[Overflows(4)])
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert folders == (["checkpoint-2"] if training else [])
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_loss_that_is_not_finite_names_its_rows(chats: Path, tmp_path: Path) -> None:
    def begin(model: PeftModel) -> None:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))

    with pytest.raises(RunError, match=r"the loss became nan at step 1, .*The step's rows began: '.* \| '"):
        run(tiny_config(chats, tmp_path / "run"), begin)


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3e38)
    check_finite(model, "now")
    model.weight.requires_grad = False  # what does not train is not looked at
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    check_finite(model, "now")
    with torch.no_grad():
        model.bias[0] = float("inf")
    with pytest.raises(RunError, match=r"not finite now \(bias\)"):
        check_finite(model, "now")
