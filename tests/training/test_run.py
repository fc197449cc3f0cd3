"""A run on the tiny model: what it leaves, and that it learns what TRL would."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from helpers import GUIDE_PEFT, GUIDE_TRAINING, RUN_FILES, TINY, chat, prepared_at, tiny_config, train_only, write_jsonl
from phinetune.api.train import train_config
from phinetune.checkpoints.load import Loaded
from phinetune.config.engine import EngineSection
from phinetune.config.run import RunConfig, load_config
from phinetune.engine.kept_memory import keeps_memory, kept_memory
from phinetune.errors import ConfigError, PhinetuneError, RunError
from phinetune.lora.one_product import room_of
from phinetune.training.run import TrainedRun, open_place, train_run


def train(chats: Path, folder: Path, resume: bool = False, **training: Any) -> TrainedRun:
    return train_only(tiny_config(chats, folder, **training), resume=resume)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(folder) if "loss" in entry]


def test_a_run_leaves_exactly_these_files(tiny_run: Path) -> None:
    assert {p.name for p in tiny_run.iterdir()} == RUN_FILES | {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert {p.name for p in (tiny_run / "checkpoint-4").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "chat_template.jinja",
        "generation_config.json",
        "log_sums_0.json",
        "manifest.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    }


def test_plain_peft_loads_the_run_and_its_tokenizer(tiny_run: Path, tiny: Loaded) -> None:
    model = PeftModel.from_pretrained(tiny.model, str(tiny_run))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    assert not torch.equal(model(ids).logits, base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run)
    question = [{"role": "user", "content": "Hi"}]
    wanted = tiny.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False) == wanted


def test_the_final_adapter_is_that_of_the_last_step(tiny_run: Path) -> None:
    last = adapter(tiny_run / "checkpoint-6")
    assert all(torch.equal(tensor, last[name]) for name, tensor in adapter(tiny_run).items())


def test_every_stop_id_is_saved(tiny_run: Path) -> None:
    assert json.loads((tiny_run / "generation_config.json").read_text())["eos_token_id"] == [259, 260, 262]


def test_metrics_hold_each_step_and_evaluation(tiny_run: Path) -> None:
    entries = metrics(tiny_run)
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "epoch", "time", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_s", "memory"}
    assert all(wanted <= e.keys() for e in steps)
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(steps))
    evaluations = [e for e in entries if "eval_loss" in e]
    assert [e["step"] for e in evaluations] == [3, 6]
    assert all({"eval_perplexity", "eval_token_accuracy"} <= e.keys() for e in evaluations)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_evaluation_during_training_is_the_one_after_it(tiny_run: Path) -> None:
    last = [e for e in metrics(tiny_run) if "eval_loss" in e][-1]
    tuned = json.loads((tiny_run / "results.json").read_text())["evaluation"]["tuned"]
    assert tuned["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert tuned["perplexity"] == pytest.approx(math.exp(tuned["loss"]), rel=1e-6)


def test_the_resolved_configuration_starts_the_same_run(tiny_run: Path, chats: Path, tmp_path: Path) -> None:
    config = load_config(tiny_run / "config.yaml", [f"training_config.output_dir={tmp_path}/again"])
    train_only(config)
    assert losses(tmp_path / "again") == losses(tiny_run)
    tree = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert set(tree) == {"model", "data", "objective", "peft_config", "training_config", "engine", "evaluation"}
    assert tree["data"]["loss_on"] == "assistant"


def test_the_log_says_what_the_guide_logs(tiny_run: Path) -> None:
    log = (tiny_run / "run.log").read_text()
    assert "device: cpu" in log
    assert "training precision: float32" in log
    assert "training_config: {" in log
    assert "peft_config: {" in log
    assert "trainable parameters: " in log


def test_rows_and_layers_are_shown_before_training(chats: Path, tmp_path: Path, console: Console) -> None:
    train_config(tiny_config(chats, tmp_path / "run", max_steps=1), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "9 kept" in shown
    assert "<|assistant|>⟦They are" in shown
    assert "gate_up_proj │     2 │         128 × 32 │    4 │" in shown
    assert "step 1/1  loss" in shown


def test_resumed_equals_uninterrupted_to_the_bit(chats: Path, tmp_path: Path) -> None:
    """With dropout, so that the random state counts, and a stop in the middle of the second epoch."""
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "cosine"}
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    whole = tiny_config(chats, tmp_path / "whole", **settings)
    whole.peft_config = config
    train_only(whole)
    stopped = tiny_config(chats, tmp_path / "stopped", **settings)
    stopped.peft_config = config
    train_only(stopped)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-9")
    resumed = train_only(stopped, resume=True)
    assert resumed.summary["steps"] == 9
    theirs, ours = adapter(tmp_path / "whole"), adapter(tmp_path / "stopped")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert [e["step"] for e in metrics(tmp_path / "stopped") if "loss" in e] == list(range(1, 10))


def test_resuming_at_the_last_step_trains_no_further(chats: Path, tmp_path: Path) -> None:
    """As when the power fails during the evaluation after training."""
    train(chats, tmp_path / "run", save_strategy="steps", save_steps=6)
    before = adapter(tmp_path / "run")
    made = train(chats, tmp_path / "run", resume=True, save_strategy="steps", save_steps=6)
    assert made.summary["steps"] == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(tmp_path / "run").items())
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_micro_batches_add_up_to_the_whole_step(chats: Path, tmp_path: Path, micro: int, accumulation: int) -> None:
    """Rows differ much in trained tokens, so a mean of means would show (transformers#34191)."""
    settings = {"max_steps": 1, "learning_rate": 1e-3}
    for name, batch, steps in (("whole", 8, 1), ("parts", micro, accumulation)):
        train(
            chats,
            tmp_path / name,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            **settings,
        )
    whole, parts = metrics(tmp_path / "whole")[0], metrics(tmp_path / "parts")[0]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


class Allocates(TrainerCallback):
    """Where a large tensor lies, at the end of each step."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.places.append(torch.empty(1 << 22).data_ptr())


def run_with(callback: TrainerCallback, config: RunConfig) -> None:
    place = open_place(config)
    train_run(prepared_at(config, place), place, callbacks=[callback])


def test_a_run_keeps_the_memory_of_large_tensors_and_gives_it_back(chats: Path, tmp_path: Path) -> None:
    if not keeps_memory(torch.device("cpu")):
        pytest.skip("no memory is kept here: no native library, or not Linux")
    with kept_memory(torch.device("cpu")):
        place = torch.empty(1 << 22).data_ptr()
    during = Allocates()
    run_with(during, tiny_config(chats, tmp_path / "fast"))
    assert set(during.places) == {place}
    assert torch.empty(1 << 22).data_ptr() != place
    plain = Allocates()
    config = tiny_config(chats, tmp_path / "plain")
    run_with(plain, config.model_copy(update={"engine": EngineSection(kind="plain")}))
    assert place not in plain.places


class Rooms(TrainerCallback):
    """For which rank the adapted layers' weights have room in the steps of a run (`phinetune.lora.one_product`).

    Attributes:
        fails: at the third step.
    """

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.seen = fails, set[int]()
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = [one.base_layer.weight for one in kwargs["model"].modules() if hasattr(one, "base_layer")]
        self.seen |= {room_of(weight) for weight in self.weights}
        if self.fails and state.global_step == 3:
            raise RuntimeError("as it was asked to")


def test_base_and_adapter_are_one_product_while_a_run_trains_and_the_base_lies_as_before_after_it(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.matmul.is_slower_than_float32", lambda dtype: False)
    for name, fails in (("whole", False), ("broken", True)):
        config, rooms = tiny_config(chats, tmp_path / name), Rooms(fails)
        config.model.dtype = "bfloat16"
        with pytest.raises(RuntimeError, match="asked") if fails else nullcontext():
            run_with(rooms, config)
        assert rooms.seen == {4}
        assert all(weight.is_contiguous() and room_of(weight) == 0 for weight in rooms.weights)


def test_resumed_equals_uninterrupted_to_the_bit_with_one_product(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.matmul.is_slower_than_float32", lambda dtype: False)
    for name in ("whole", "stopped"):
        config = tiny_config(chats, tmp_path / name, max_steps=9, save_strategy="steps", save_steps=7)
        config.model.dtype = "bfloat16"
        train_only(config)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-9")
    train_only(config, resume=True)
    theirs, ours = adapter(tmp_path / "whole"), adapter(tmp_path / "stopped")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def test_gradient_checkpointing_changes_nothing(chats: Path, tmp_path: Path) -> None:
    for name, on in (("off", False), ("on", True)):
        reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if on else {}
        train(chats, tmp_path / name, gradient_checkpointing=on, **reentrant)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-6)


def test_packing_fills_rows_and_trains_the_same_tokens(chats: Path, tmp_path: Path) -> None:
    made = train(chats, tmp_path / "run", packing=True, max_length=200, num_train_epochs=1, max_steps=-1)
    assert made.summary["tokens"] == made.prepared.chats.train.report.tokens
    assert made.summary["steps"] < 5


def test_the_guides_settings_run_unchanged(chats: Path, tmp_path: Path) -> None:
    """bf16 on any processor, checkpointing, warm-up ratio, dropout, the retired key."""
    config = tiny_config(chats, tmp_path / "run")
    config.training_config = {**GUIDE_TRAINING, "output_dir": str(tmp_path / "run"), "logging_steps": 1}
    config.peft_config = dict(GUIDE_PEFT)
    made = train_only(config)
    assert made.summary["steps"] == 3  # nine chats in batches of four, one epoch
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_only_the_newest_checkpoints_are_kept(chats: Path, tmp_path: Path) -> None:
    train(chats, tmp_path / "run", save_strategy="steps", save_steps=2, save_total_limit=1)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_the_best_checkpoint_is_loaded_at_the_end(chats: Path, tmp_path: Path) -> None:
    made = train(
        chats,
        tmp_path / "run",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # asks for the worst, which is early, so that best and last differ
        save_total_limit=1,
    )
    found = {e["step"]: e["eval_loss"] for e in metrics(tmp_path / "run") if "eval_loss" in e}
    best = max(found, key=found.__getitem__)
    assert best < 6
    state = adapter(tmp_path / "run" / f"checkpoint-{best}")
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter(made.folder.path).items())


def test_a_run_that_diverges_stops_and_names_the_batch(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run", learning_rate=1e14, save_strategy="steps", save_steps=1)
    config.peft_config["lora_alpha"] = 1e15
    with pytest.raises(RunError) as caught:
        train_only(config)
    text = str(caught.value)
    assert "the loss became" in text
    assert "The step's rows began: '<|" in text
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"report_to": "comet_ml"}, "training_config.report_to: comet_ml is not installed"),
        ({"eval_strategy": "sometimes"}, "training_config.eval_strategy: it should be one of"),
    ],
)
def test_settings_that_a_library_refuses_are_a_sentence(
    chats: Path, tmp_path: Path, training: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(chats, tmp_path / "run", **training)
    assert words in str(caught.value)


def test_a_tracker_gets_the_run(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(chats, tmp_path / "run", report_to="tensorboard", max_steps=1)
    assert any("tfevents" in file.name for file in (tmp_path / "board").rglob("*"))


def test_a_folder_that_holds_other_files_is_left_alone(chats: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(RunError, match="holds files that no run of phinetune wrote"):
        train(chats, folder)
    assert (folder / "README.md").read_text() == "mine"


def test_problems_are_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "none.jsonl", tmp_path / "run")
    config.model.path = "nowhere/to-be-found"
    with pytest.raises(PhinetuneError, match=r"none\.jsonl: no such file"):
        train_only(config)
    assert not (tmp_path / "run").exists()


def test_a_row_that_spoils_the_run_leaves_no_run(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", [chat("a", "b"), *[chat("c", "d")] * 5, {"messages": [{"role": "user", "content": "x"}]}]
    )
    config = tiny_config(file, tmp_path / "run")
    with pytest.raises(PhinetuneError, match=r"a\.jsonl:7: no assistant turn"):
        train_only(config)
    assert not (tmp_path / "run").exists()
    assert config.model.path == TINY


def test_files_with_text_of_the_user_are_for_the_user_alone(tiny_run: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in tiny_run.iterdir() if path.is_file()}
    private = {"results.json", "start.json", "run.log", "report.html", "samples.jsonl"} & modes.keys()
    assert {"results.json", "start.json", "run.log", "report.html"} <= private
    assert {name: modes[name] for name in private} == dict.fromkeys(private, 0o600)
