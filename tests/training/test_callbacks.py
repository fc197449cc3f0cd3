"""What a power cut and a resume do to metrics.jsonl, and what Ctrl-C does to a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from helpers import tiny_config
from phinetune.config.run import dump_config
from phinetune.errors import RunError
from phinetune.training.callbacks import GradientCheck, MetricsWriter, drop_lines_after


def test_lines_past_the_checkpoint_and_a_cut_line_are_dropped_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    state = TrainerState(global_step=2, is_world_process_zero=True)
    writer = MetricsWriter(file)
    writer.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), state, None)  # type: ignore[arg-type]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("spoiled", "kept"),
    [
        ('{"step": 1}\n{"step": 2, "answer": "a\u2028b"}\n{"step": 3}\n', [1, 2]),  # a break inside a text
        ('{"step": 1}\n\0\0\0\0\n{"step": 2}\n', [1, 2]),  # writes that were lost
        ('{"step": 1}\n[]\n12\n"step"\n{"loss": 3}\n{"step": null}\n{"step": 2}', [1, 2]),
        ('{"step": 1}\n\udcff\udcfe\n{"step": 3}\n', [1]),
        ("", []),
    ],
)
def test_each_line_up_to_the_checkpoint_stays_whatever_lies_between(
    tmp_path: Path, spoiled: str, kept: list[int]
) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_bytes(spoiled.encode(errors="surrogateescape"))
    drop_lines_after(file, 2)
    lines = [json.loads(line) for line in file.read_text().split("\n") if line]
    assert [line["step"] for line in lines] == kept
    assert all(line.get("answer") in (None, "a\u2028b") for line in lines)


def test_lines_are_dropped_in_one_rename(tmp_path: Path) -> None:
    """A process that dies while it drops lines leaves all of them, not some."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    opened = file.open()
    drop_lines_after(file, 2)
    assert opened.read() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    state = TrainerState(global_step=2, epoch=0.5, is_world_process_zero=True)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    writer.on_log(args, state, None, logs={"loss": 1.0, "grad_norm": float("inf")})  # type: ignore[arg-type]
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (entry["step"], entry["epoch"], entry["loss"], entry["grad_norm"]) == (2, 0.5, 1.0, None)


@pytest.mark.parametrize("gradient", [0.0, 1e-9])
def test_an_adapter_without_gradient_is_noticed_at_the_first_step(gradient: float, tmp_path: Path) -> None:
    """LoRA's B starts at zero and so A has no gradient yet: one tensor with any is enough."""
    model = torch.nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.full((2,), gradient)
    check, args = GradientCheck(), TrainingArguments(str(tmp_path), use_cpu=True)
    if gradient:
        check.on_pre_optimizer_step(args, None, None, model=model)  # type: ignore[arg-type]
        model.bias.grad.zero_()  # later steps are not looked at
        check.on_pre_optimizer_step(args, None, None, model=model)  # type: ignore[arg-type]
    else:
        with pytest.raises(RunError, match="all zero at the first step"):
            check.on_pre_optimizer_step(args, None, None, model=model)  # type: ignore[arg-type]


def test_ctrl_c_saves_and_says_how_to_go_on(chats: Path, tmp_path: Path) -> None:
    """A real process is interrupted after its first steps; it saves, and goes on to the same end."""
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    settings = {
        "max_steps": 400,
        "save_strategy": "steps",
        "save_steps": 1000,
        "logging_steps": 1,
        "eval_strategy": "no",
    }
    file.write_text(dump_config(tiny_config(chats, run, **settings)))
    command = [sys.executable, "-m", "phinetune", "train", str(file)]
    bare = {**os.environ, "PATH": os.defpath}  # without a `phinetune` that could be called by its name
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=bare)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert f"  python -m phinetune train {file} --resume\n" in out
    assert not (run / "results.json").exists()
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < 400
    again = [*command, "--resume", "--set", f"training_config.max_steps={step + 2}"]
    refused = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "training_config.max_steps: the run has 400" in refused.stderr
    done = subprocess.run([*again, "--changed"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, step + 3))
    assert (run / "results.json").is_file()
