"""A resumed run is the one that stopped: what has changed is refused, taken knowingly, or without harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers import chat, prepared_at, tiny_config, train_only, write_jsonl
from phinetune.api.train import train_config
from phinetune.config.run import RunConfig, make_config
from phinetune.errors import ConfigError, RunError
from phinetune.exporting.hub.markdown import plain
from phinetune.reporting.facts import read_run
from phinetune.secret_text import tree_without_secrets
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.recorded import settings_of
from phinetune.training.run import TrainedRun, open_place, train_run

Edit = Callable[[RunConfig], None]


class StopAt(TrainerCallback):
    """Stops a run as Ctrl-C does: with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def stop_at(config: RunConfig, step: int, **place: bool) -> TrainedRun:
    opened = open_place(config, **place)
    return train_run(prepared_at(config, opened), opened, callbacks=[StopAt(step)])


def config_of(chats: Path, folder: Path, **training: Any) -> RunConfig:
    """Nine rows in steps of one, two epochs, a checkpoint every four steps."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 1, "save_strategy": "steps"}
    return tiny_config(chats, folder, **{**settings, "save_steps": 4, "lr_scheduler_type": "constant", **training})


@pytest.fixture(scope="module")
def stopped_once(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 4. Copy it; don't write into it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_at(config_of(chats, folder), 4)
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if "loss" in entry]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def setting(section: str, key: str, value: Any) -> Edit:
    def edit(config: RunConfig) -> None:
        part = getattr(config, section)
        if isinstance(part, dict):
            part[key] = value
        else:
            setattr(part, key, value)

    return edit


REFUSED: dict[str, tuple[str, str, Any, str]] = {
    "batch": ("training_config", "per_device_train_batch_size", 3, "per_device_train_batch_size: the run has 1"),
    "accumulation": ("training_config", "gradient_accumulation_steps", 2, "the run has 1, the configuration now has 2"),
    "seed": ("training_config", "seed", 7, "training_config.seed: the run has 42, the configuration now has 7"),
    "rate": ("training_config", "learning_rate", 0.5, "training_config.learning_rate: the run has 0.01"),
    "longer": ("training_config", "num_train_epochs", 3, "training_config.num_train_epochs"),
    "schedule": ("training_config", "lr_scheduler_type", "cosine", "the run has constant"),
    "optimizer": ("training_config", "optim", "adamw_torch", "optimizer's state in the checkpoint would not fit"),
    "sampling": ("training_config", "train_sampling_strategy", "sequential", "train_sampling_strategy"),
    "rank": ("peft_config", "r", 8, "peft_config.r: the run has 4, the configuration now has 8"),
    "scale": ("peft_config", "lora_alpha", 16, "peft_config.lora_alpha"),
    "dropout": ("peft_config", "lora_dropout", 0.5, "peft_config.lora_dropout"),
    "labels": ("data", "loss_on", "all", "data.loss_on: the run has assistant, the configuration now has all"),
    "limit": ("data", "limit", 11, "data.train holds"),
    "split": ("data", "seed", 3, "the held-out rows"),
    "engine": ("engine", "kind", "plain", "engine.kind: the run has fast"),
    "sharing": ("engine", "share_prefixes", False, "engine.share_prefixes"),
    "dtype": ("model", "dtype", "bfloat16", "model.dtype: the run has torch.float32"),
    "attention": ("model", "attn_implementation", "eager", "model.attn_implementation"),
    "weights": ("model", "seed", 1, "the base: SHA-256"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_decides_the_result_is_refused_with_both_values_and_nothing_is_touched(
    chats: Path, stopped: Path, name: str
) -> None:
    section, key, value, words = REFUSED[name]
    config, before = config_of(chats, stopped), snapshot(stopped)
    setting(section, key, value)(config)
    with pytest.raises(RunError) as caught:
        train_only(config, resume=True)
    assert words in str(caught.value)
    assert "--resume --changed" in caught.value.problems[-1]
    assert snapshot(stopped) == before


def test_a_dtype_that_was_chosen_stays_on_a_machine_that_would_choose_another(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(chats, tmp_path / "run")
    monkeypatch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: True)
    stop_at(config, 4)
    whole = train_only(config_of(chats, tmp_path / "whole"))
    monkeypatch.setattr("phinetune.checkpoints.device.has_native_bf16", lambda device: False)
    resumed = train_only(config, resume=True)
    assert resumed.loaded.model.dtype == torch.bfloat16
    one, two = (load_file(run.folder.path / "adapter_model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(one[name], two[name]) for name in two)
    note = "model.dtype: bfloat16, as the run began; on this machine `auto` would be float32"
    assert note in resumed.prepared.settings.notes


def test_all_differences_are_told_at_once(chats: Path, stopped: Path) -> None:
    config = config_of(chats, stopped, seed=1, weight_decay=0.5)
    config.peft_config["lora_alpha"] = 2
    with pytest.raises(RunError) as caught:
        train_only(config, resume=True)
    told = [problem.split(":")[0] for problem in caught.value.problems[:-1]]
    assert sorted(told) == ["peft_config.lora_alpha", "training_config.seed", "training_config.weight_decay"]


def test_rows_are_compared_by_content_not_by_place(
    rows: list[dict[str, Any]], chats: Path, stopped: Path, tmp_path: Path
) -> None:
    same = write_jsonl(tmp_path / "moved.jsonl", rows)
    assert train_only(config_of(same, stopped), resume=True).summary["steps"] == 18
    stopped_again = config_of(write_jsonl(same, [chat("other", "row"), *rows[1:]]), stopped)
    with pytest.raises(RunError, match=r"the (training|held-out) rows: SHA-256"):
        train_only(stopped_again, resume=True)


def test_another_tokenizer_in_the_same_place_is_noticed(chats: Path, tmp_path: Path, tiny: Any) -> None:
    base, folder = tmp_path / "base", tmp_path / "run"
    tiny.model.save_pretrained(base)
    tiny.tokenizer.save_pretrained(base)
    config = config_of(chats, folder)
    config.model.path = str(base)
    stop_at(config, 4)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{# no token changes by this #}")
    with pytest.raises(RunError) as caught:
        train_only(config, resume=True)
    assert [problem.split(":")[0] for problem in caught.value.problems[:-1]] == ["the tokenizer"]


@pytest.mark.parametrize("library", ["phinetune", "torch", "peft"])
def test_other_versions_are_noticed(chats: Path, stopped: Path, library: str) -> None:
    start = json.loads((stopped / "start.json").read_text())
    start["decides"][f"versions.{library}"] = "0.0.1"
    (stopped / "start.json").write_text(json.dumps(start))
    with pytest.raises(RunError, match=rf"versions\.{library}: the run has 0\.0\.1"):
        train_only(config_of(chats, stopped), resume=True)
    made = train_only(config_of(chats, stopped), resume=True, changed=True)
    assert made.summary["steps"] == 18


HARMLESS: dict[str, Edit] = {
    "saving": setting("training_config", "save_steps", 3),
    "keeping": setting("training_config", "save_total_limit", 2),
    "logging": setting("training_config", "logging_steps", 2),
    "memory": setting("engine", "activation_memory", "all"),
    "workers": setting("training_config", "dataloader_num_workers", 1),
    "evaluating": setting("training_config", "eval_strategy", "epoch"),
    "answers": setting("evaluation", "max_new_tokens", 3),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_that_is_trained_is_taken_with_a_line(
    chats: Path, stopped: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "phinetune")
    whole = train_only(config_of(chats, tmp_path / "whole"))
    config = config_of(chats, stopped)
    HARMLESS[name](config)
    made = train_only(config, resume=True)
    assert "what is trained stays the same" in caplog.text
    assert made.summary["changed"] == []
    theirs, ours = (load_file(run.folder.path / "adapter_model.safetensors") for run in (whole, made))
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


def test_new_intervals_are_those_that_count(chats: Path, stopped: Path) -> None:
    """transformers would go by those of the checkpoint."""
    train_only(config_of(chats, stopped, save_steps=7, logging_steps=5), resume=True)
    assert {int(p.name.split("-")[1]) for p in stopped.glob("checkpoint-*")} == {4, 7, 14, 18}
    assert [entry["step"] for entry in metrics(stopped)] == [1, 2, 3, 4, 5, 10, 15]


@pytest.mark.parametrize(
    "spelling",
    [
        {"learning_rate": "1e-2"},
        {"weight_decay": 0.0, "adam_beta1": 0.9},
        {"per_gpu_train_batch_size": 1, "per_device_train_batch_size": 1},
        {"group_by_length": False},
    ],
    ids=str,
)
def test_another_spelling_is_no_change(
    chats: Path, stopped: Path, spelling: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "phinetune")
    assert train_only(config_of(chats, stopped, **spelling), resume=True).summary["steps"] == 18
    assert "what is trained stays the same" not in caplog.text


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj", "up_proj", "down_proj"], None])
def test_other_names_of_the_same_layers_are_no_change(chats: Path, tmp_path: Path, targets: Any) -> None:
    config = config_of(chats, tmp_path / "run")
    config.peft_config["target_modules"] = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    stop_at(config, 4)
    config.peft_config["target_modules"] = targets
    assert train_only(config, resume=True).summary["steps"] == 18
    config.peft_config["target_modules"] = ["qkv_proj"]
    with pytest.raises(RunError, match=r"the configuration now has qkv_proj \(layers 0, 1\)"):
        train_only(config, resume=True)


def test_a_path_from_here_is_its_absolute_one(
    chats: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "phinetune")
    monkeypatch.chdir(chats.parent)
    config = config_of(Path(chats.name), stopped)
    train_only(config, resume=True)
    assert "what is trained stays the same" not in caplog.text


@pytest.mark.parametrize(("key", "value"), [("eval_steps", 1), ("save_steps", 6), ("max_prompts", 1)])
def test_where_evaluations_decide_their_settings_count(chats: Path, tmp_path: Path, key: str, value: int) -> None:
    """With the best checkpoint loaded at the end, other evaluations give another adapter."""
    best = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True}
    stop_at(config_of(chats, tmp_path / "run", **best), 6)
    config = config_of(chats, tmp_path / "run", **best)
    setting("evaluation" if key == "max_prompts" else "training_config", key, value)(config)
    with pytest.raises(RunError, match=key):
        train_only(config, resume=True)


@pytest.mark.parametrize(
    ("training", "ends"),
    [
        ({"per_device_train_batch_size": 3}, [6, 9]),  # 4 rows done, then 3 and 2; then 3, 3, 3
        ({"per_device_train_batch_size": 2}, [7, 12]),  # 2, 2, 1; then 2, 2, 2, 2, 1
        ({"gradient_accumulation_steps": 4}, [6, 9]),  # 4, 1; then 4, 4, 1
        ({"per_device_train_batch_size": 9}, [5, 6]),
    ],
    ids=str,
)
def test_another_batch_goes_on_at_the_next_row(
    chats: Path, stopped: Path, training: dict[str, Any], ends: list[int]
) -> None:
    """Each epoch has all nine rows once: its tokens are those of the set."""
    made = train_only(config_of(chats, stopped, **training), resume=True, changed=True)
    tokens = {entry["step"]: entry["tokens"] for entry in metrics(stopped)}
    total = made.prepared.chats.train.report.tokens
    assert [tokens[step] for step in ends] == [total, 2 * total]
    assert made.summary["steps"] == ends[-1]
    epochs = [entry["epoch"] for entry in metrics(stopped)]
    assert epochs == sorted(epochs)
    assert epochs[ends[0] - 1] == 1.0


def test_a_changed_run_that_is_stopped_again_goes_on_where_it_was(chats: Path, stopped: Path, tmp_path: Path) -> None:
    """Stopped in the epoch of the change and in a later one, it ends as if it had not been stopped."""
    config = config_of(chats, stopped, per_device_train_batch_size=2, learning_rate=1e-3)
    unbroken = Path(shutil.copytree(stopped, tmp_path / "unbroken"))
    train_only(config_of(chats, unbroken, **_training(config)), resume=True, changed=True)
    stop_at(config, 5, resume=True, changed=True)
    stop_at(config, 9, resume=True)
    train_only(config, resume=True)
    assert [e["loss"] for e in metrics(stopped)] == [e["loss"] for e in metrics(unbroken)]
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (stopped, unbroken))
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())


def test_a_changed_run_that_died_before_its_next_checkpoint_keeps_its_change(chats: Path, stopped: Path) -> None:
    class Dies(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    config = config_of(chats, stopped, per_device_train_batch_size=3, learning_rate=1e-3)
    prepared = prepare_run(settle(config))
    with pytest.raises(KeyboardInterrupt):
        train_run(prepared, open_place(config, resume=True, changed=True), callbacks=[Dies()])
    made = train_only(config, resume=True)
    assert [entry["learning_rate"] for entry in metrics(stopped)] == [1e-2] * 4 + [1e-3] * 5
    assert [entry["step"] for entry in made.summary["changed"]] == [4]


@pytest.mark.parametrize("gone", [{4, 5}, {5}])
def test_a_change_stays_in_force_from_an_earlier_checkpoint(
    chats: Path, tmp_path: Path, console: Console, gone: set[int]
) -> None:
    """The rows that the checkpoint has not seen come in steps of the new size, and the card names the change."""
    folder = tmp_path / "run"
    stop_at(config_of(chats, folder, save_steps=2), 4)
    config = config_of(chats, folder, save_steps=2, per_device_train_batch_size=3, learning_rate=1e-3)
    stop_at(config, 5, resume=True, changed=True)
    for step in gone:
        shutil.rmtree(folder / f"checkpoint-{step}")
    made = train_config(config, console, resume=True)
    begun, epochs = (2, [5, 8]) if 4 in gone else (4, [6, 9])  # of 9 rows 2 are done, then 3, 3, 1; or 4, then 3, 2
    tokens = {entry["step"]: entry["tokens"] for entry in metrics(folder)}
    assert 2 * tokens[epochs[0]] == tokens[epochs[1]]
    assert len(tokens) == epochs[1]
    rates = [entry["learning_rate"] for entry in metrics(folder)]
    assert rates == [1e-2] * begun + [1e-3] * (epochs[1] - begun)
    (change,) = made.results["training"]["changed"]
    assert change["step"] == begun
    told = f"Resumed with something changed at step {begun}: "
    assert plain(told) in (folder / "README.md").read_text()


def _training(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in config.training_config.items() if key != "output_dir"}


@pytest.mark.parametrize("stop", [4, 9])
def test_other_rows_begin_their_epoch_again(rows: list[dict[str, Any]], chats: Path, tmp_path: Path, stop: int) -> None:
    folder = tmp_path / "run"
    stop_at(config_of(chats, folder), stop)
    more = write_jsonl(tmp_path / "more.jsonl", [*rows, chat("a", "b"), chat("c", "d"), chat("e", "f"), chat("g", "h")])
    made = train_only(config_of(more, folder), resume=True, changed=True)
    epoch = len(made.prepared.chats.train)
    assert epoch > 9
    assert made.summary["steps"] == stop + (1 if stop == 9 else 2) * epoch


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_changed_rate_is_the_one_that_counts(chats: Path, tmp_path: Path, schedule: str) -> None:
    """transformers would go on with the checkpoint's rate; here it is that of an unbroken run with the new rate."""
    given = {"lr_scheduler_type": schedule, "weight_decay": 0.0}
    stop_at(config_of(chats, tmp_path / "run", **given), 4)
    train_only(config_of(chats, tmp_path / "run", **given, learning_rate=1e-3), resume=True, changed=True)
    train_only(config_of(chats, tmp_path / "whole", **given, learning_rate=1e-3))
    ours, theirs = ([e["learning_rate"] for e in metrics(tmp_path / name)] for name in ("run", "whole"))
    assert ours[4:] == pytest.approx(theirs[4:])
    assert ours[0] == pytest.approx(1e-2)


def test_a_changed_optimizer_setting_is_the_one_that_counts(chats: Path, stopped: Path) -> None:
    """With a weight decay of 1 / rate, a step sets every weight to nothing but its own update."""
    config = config_of(chats, stopped, max_steps=5, weight_decay=100.0)
    made = train_only(config, resume=True, changed=True)
    before = load_file(stopped / "checkpoint-4" / "adapter_model.safetensors")
    after = load_file(made.folder.path / "adapter_model.safetensors")
    assert all((after[name].abs() < 0.05).all() for name in after)
    assert any((before[name].abs() > 0.1).any() for name in before)


def test_a_change_is_recorded_on_the_card_and_on_the_page(chats: Path, stopped: Path, console: Console) -> None:
    config = config_of(chats, stopped, per_device_train_batch_size=3)
    made = train_config(config, console, resume=True, changed=True)
    told = "Resumed with something changed at step 4: per_device_train_batch_size 1 → 3."
    assert plain(told) in (stopped / "README.md").read_text()
    assert told in read_run(stopped).notes
    assert told in (stopped / "report.html").read_text()
    assert made.results["training"]["changed"][0]["step"] == 4
    assert json.loads((stopped / "start.json").read_text())["changed"][0]["what"] == [
        "per_device_train_batch_size 1 → 3"
    ]
    assert "per_device_train_batch_size: 3" in (stopped / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("peft_config", "r", 8),
        ("peft_config", "target_modules", ["o_proj"]),
        ("peft_config", "modules_to_save", ["lm_head"]),
        ("training_config", "optim", "adafactor"),
        ("data", "streaming", True),
    ],
)
def test_what_can_not_be_right_is_refused_even_knowingly(
    chats: Path, stopped: Path, section: str, key: str, value: Any
) -> None:
    config, before = config_of(chats, stopped, max_steps=18), snapshot(stopped)
    setting(section, key, value)(config)
    if key == "streaming":
        config.data.eval = None
    with pytest.raises(RunError, match="not even --changed takes this"):
        train_only(config, resume=True, changed=True)
    assert snapshot(stopped) == before


def test_changed_alone_is_refused(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--changed .* give --resume"):
        train_only(config_of(chats, tmp_path / "run"), changed=True)


def test_resume_and_overwrite_exclude_each_other(chats: Path, stopped: Path) -> None:
    with pytest.raises(RunError, match="give one of them"):
        train_only(config_of(chats, stopped), resume=True, overwrite=True)


def test_a_run_of_an_older_version_is_compared_as_far_as_its_files_tell(
    chats: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = json.loads((stopped / "start.json").read_text())
    for key in ("decides", "stretches", "changed"):
        del start[key]
    (stopped / "start.json").write_text(json.dumps(start))
    wrong = config_of(chats, stopped, per_device_train_batch_size=3)
    wrong.data.limit = 10
    wrong.model.seed = 1
    with pytest.raises(RunError) as caught:
        train_only(wrong, resume=True)
    told = [problem.split(":")[0] for problem in caught.value.problems]
    assert {"training_config.per_device_train_batch_size", "data.train holds", "the base"} <= set(told)
    assert train_only(config_of(chats, stopped), resume=True).summary["steps"] == 18
    assert (
        "not compared, since the run recorded nothing of it: the training rows, the held-out rows, the tokenizer"
        in caplog.text
    )


# ---- checkpoints that can't be gone on from, and wishes in the dictionary


def test_a_run_without_checkpoints_is_not_warned_of_what_they_hold(
    chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_only(config_of(chats, tmp_path / "run", save_only_model=True, save_strategy="no", max_steps=1))
    assert "checkpoints hold no optimizer" not in caplog.text


def test_checkpoints_without_an_optimizer_are_not_gone_on_from_and_not_deleted(
    chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(chats, tmp_path / "run", save_only_model=True)
    stop_at(config, 4)
    assert "save_only_model" in caplog.text
    before = snapshot(tmp_path / "run")
    with pytest.raises(RunError, match=r"checkpoint-4 can't be gone on from, since it lacks optimizer\.pt"):
        train_only(config, resume=True)
    with pytest.raises(RunError, match="checkpoints that a run can't go on from"):
        train_only(config)
    assert snapshot(tmp_path / "run") == before


def test_a_finished_run_without_checkpoints_is_not_begun_again(chats: Path, tmp_path: Path, console: Console) -> None:
    config = config_of(chats, tmp_path / "run", save_strategy="no", max_steps=1)
    config.evaluation.enabled = False
    train_config(config, console)
    before = snapshot(tmp_path / "run")
    with pytest.raises(RunError, match="finished run without checkpoints"):
        train_only(config, resume=True)
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("wish", [True, "true", "checkpoint-4", "."])
def test_resume_from_checkpoint_in_the_dictionary_is_resume(chats: Path, stopped: Path, wish: Any) -> None:
    place = str(stopped / wish) if wish in ("checkpoint-4", ".") else wish
    made = train_only(config_of(chats, stopped, resume_from_checkpoint=place))
    assert made.summary["steps"] == 18
    assert [entry["step"] for entry in metrics(stopped)] == list(range(1, 19))
    assert "resume_from_checkpoint:" not in (stopped / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("elsewhere/checkpoint-4", "no checkpoint that the run in"),
        ("checkpoint-4", "checkpoint-8 is newer"),
        (3, "training_config.resume_from_checkpoint"),
    ],
)
def test_a_checkpoint_of_another_run_or_before_the_newest_is_refused(
    chats: Path, stopped: Path, wish: Any, words: str
) -> None:
    stop_at(config_of(chats, stopped), 8, resume=True)
    place = str(stopped / wish) if isinstance(wish, str) else wish
    with pytest.raises((RunError, ConfigError), match=words):
        train_only(config_of(chats, stopped, resume_from_checkpoint=place))


@pytest.mark.parametrize("wish", [False, None, "false"])
def test_a_wish_not_to_resume_starts_a_run(chats: Path, tmp_path: Path, wish: Any) -> None:
    made = train_only(config_of(chats, tmp_path / "run", resume_from_checkpoint=wish, max_steps=1))
    assert made.summary["steps"] == 1


@pytest.mark.parametrize("key", ["auto_find_batch_size", "enable_jit_checkpoint"])
def test_keys_that_would_change_a_run_behind_its_record_are_left_out(chats: Path, tmp_path: Path, key: str) -> None:
    prepared = prepare_run(settle(config_of(chats, tmp_path / "run", **{key: True})))
    assert [note for note in prepared.settings.notes if f"`{key}` has no effect: " in note]
    assert not getattr(prepared.args, key)


@pytest.mark.parametrize("key", ["restore_callback_states_from_checkpoint", "save_on_each_node", "full_determinism"])
def test_other_keys_about_checkpoints_resume_to_the_bit(chats: Path, tmp_path: Path, key: str) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        stop_at(config_of(chats, tmp_path / "run", **{key: True}), 4)
        train_only(config_of(chats, tmp_path / "run", **{key: True}), resume=True)
        train_only(config_of(chats, tmp_path / "whole", **{key: True}))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    ours, theirs = ([e["loss"] for e in metrics(tmp_path / name)] for name in ("run", "whole"))
    assert ours == theirs


def test_make_config_reads_the_wish_as_yaml_gives_it() -> None:
    config = make_config({"data": {"train": "x"}}, ["training_config.resume_from_checkpoint=true"])
    assert config.training_config["resume_from_checkpoint"] is True


def test_what_is_recorded_has_no_secret_and_the_library_of_the_optimizer(chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    token = "hf_" + "a" * 30
    record = settings_of(
        prepare_run(settle(config_of(chats, tmp_path / "run", run_name=token, optim="adamw_bnb_8bit")))
    )
    assert token not in json.dumps(record)
    assert tree_without_secrets(record) == record
    assert "versions.bitsandbytes" in record
