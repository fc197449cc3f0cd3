"""The library does the command line's work, and costs nothing until it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import phinetune
from helpers import TINY, chat, write_jsonl
from phinetune import evaluate, load, train
from phinetune.errors import ModelError, RunError


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, phinetune; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = phinetune.nothing_like_it


def test_the_package_and_its_metadata_name_one_version() -> None:
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{phinetune.__version__}"\n' in pyproject


def test_two_dictionaries_train_evaluate_and_load(chats: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [chat(f"And {i}?", f"It is {i}.") for i in range(4)])
    run = train(
        model=TINY,
        data={"train": str(chats), "eval": str(held_out)},
        peft_config={"r": 4},
        training_config={"output_dir": str(tmp_path / "run"), "max_steps": 2, "learning_rate": 1e-2},
        evaluation={"max_prompts": 2, "max_new_tokens": 4},
    )
    assert run.path == tmp_path / "run"
    assert not run.stopped
    assert json.loads((run.path / "results.json").read_text()) == json.loads(json.dumps(run.results))
    again = evaluate(run.path, evaluation={"generate": False}, console=Console(quiet=True))
    assert again.results["tuned"]["loss"] == pytest.approx(run.results["evaluation"]["tuned"]["loss"], rel=1e-6)
    model, tokenizer = load(run.path)
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_a_run_without_held_out_chats_is_not_compared(chats: Path, tmp_path: Path) -> None:
    run = train(model=TINY, data=str(chats), training_config={"output_dir": str(tmp_path / "run"), "max_steps": 1})
    assert "evaluation" not in run.results
    with pytest.raises(ModelError, match="name a file with --data FILE"):
        evaluate(run.path)


def test_a_replacement_that_fails_leaves_the_earlier_run_in_its_place(chats: Path, tmp_path: Path) -> None:
    """At once, and not only for the next `train`."""
    folder, quiet = tmp_path / "run", Console(quiet=True)
    training = {"output_dir": str(folder), "max_steps": 1}
    before = train(model=TINY, data=str(chats), training_config=training, console=quiet).results
    training |= {"learning_rate": 1e15, "max_steps": 3}  # the second step overflows
    huge = {"lora_alpha": 10**15}
    with pytest.raises(RunError, match="became nan at step 2"):
        train(TINY, str(chats), huge, training, overwrite=True, console=quiet)
    assert not (folder / ".replaced").exists()
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(before))
    assert evaluate(folder, str(chats), {"generate": False}, console=quiet).results["tuned"]


def test_checkpoints_and_models_without_an_adapter_are_evaluated_too(tiny_run: Path, chats: Path) -> None:
    quiet, options = Console(quiet=True), {"generate": False}
    last = evaluate(tiny_run / "checkpoint-6", str(chats), options, record=False, console=quiet).results
    whole = evaluate(tiny_run, str(chats), options, record=False, console=quiet).results
    assert last == whole
    alone = evaluate(TINY, str(chats), options, console=quiet).results
    assert alone["base"]["loss"] == pytest.approx(whole["base"]["loss"], rel=1e-6)  # other batches, other rounding


def test_an_adapter_of_plain_peft_is_loaded_on_the_base_it_names(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((tiny_run / name).read_bytes())
    with pytest.raises(ModelError, match="names no base model"):
        load(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = TINY
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load(folder)[0](ids).logits, load(tiny_run)[0](ids).logits)
