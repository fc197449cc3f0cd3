"""A plan says yes or no, and what would fit does fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.cli_helpers import run
from helpers import chat, tiny_config, write_jsonl
from phinetune.config.run import RunConfig, dump_config, load_config
from phinetune.cpu_share import Company
from phinetune.planning.fitting_settings import nearest_fitting
from phinetune.planning.plan import busy_sentence, make_plan
from phinetune.planning.setup import Setup
from phinetune.screen.plan import as_options
from phinetune.training.prepare import prepare_run, settle


def written(config: RunConfig, folder: Path) -> Path:
    file = folder / "run.yaml"
    file.write_text(dump_config(config))
    return file


def test_a_run_that_fits(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tiny_config(chats, tmp_path / "run"), tmp_path)
    assert run(monkeypatch, "plan", file) == 0
    out = capsys.readouterr().out
    assert "Yes: it fits." in out
    assert "tokens/s" in out
    assert out.rstrip().splitlines()[-1] == f"Next: phinetune train {file}"
    assert not (tmp_path / "run").exists()
    assert run(monkeypatch, "plan", file, "--json", "--no-probe") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["fits"] is True
    assert tree["steps"]["count"] == 6
    assert tree["seconds"] is None
    assert tree["memory"]["total"] > tree["memory"]["weights"]


def test_a_folder_that_is_taken_is_noted(chats: Path, tiny_run: Path) -> None:
    """`train` takes it with --overwrite or --resume, so the plan has its numbers all the same."""
    made = make_plan(tiny_config(chats, tiny_run), probe=False)
    assert f"output_dir {tiny_run} holds a finished run; name another folder" in made.notes[-1]
    assert made.fits


def test_what_train_refuses_of_the_folder_is_the_last_line(
    chats: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, wish, words in (
        (tiny_run, None, "holds a finished run"),
        (tmp_path / "new", True, "holds no run to go on with"),
        (tmp_path / "new", "checkpoint-4", "holds no run to go on with"),
    ):
        file = written(tiny_config(chats, folder, resume_from_checkpoint=wish), tmp_path)
        assert run(monkeypatch, "plan", file, "--no-probe") == 0
        last = capsys.readouterr().out.rstrip().splitlines()[-1]
        assert last.startswith("`train` refuses it as the folder is now: ")
        assert words in last


def large(tmp_path: Path, **changes: Any) -> RunConfig:
    """Chats so long that a micro-batch takes more than the weights."""
    rows = [chat(f"w{i:02} " * 300, f"{i:02} " * 100) for i in range(40)]
    config = tiny_config(write_jsonl(tmp_path / "long.jsonl", rows), tmp_path / "run", per_device_train_batch_size=8)
    config.training_config["max_length"] = 4096
    config.engine.activation_memory = "none"
    return config.model_copy(update=changes)


def test_a_run_that_does_not_fit_is_told_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = large(tmp_path)
    need = make_plan(config, probe=False).memory.total
    monkeypatch.setattr("phinetune.planning.setup.free_bytes", lambda device: need * 2 // 3)
    file = written(config, tmp_path)
    assert run(monkeypatch, "plan", file, "--no-probe") == 1
    out = capsys.readouterr().out
    assert "No: there is not enough memory." in out
    options = [line.split() for line in out.splitlines() if line.startswith("  --set ")]
    assert len(options) >= 3
    for option in options:
        assert run(monkeypatch, "plan", file, "--no-probe", *option) == 0, option
        again = make_plan(load_config(file, option[1::2]), probe=False)
        assert again.memory.total <= need * 2 // 3, option
        assert again.steps.tokens <= make_plan(config, probe=False).steps.tokens, option


def test_kinds_of_change_are_put_together_where_none_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup.of(prepare_run(settle(large(tmp_path))))
    alone = [setup.changed(one).need().memory.total for one in nearest_fitting(setup)]
    assert alone == [] or max(alone) <= setup.free
    least = setup.changed({"training_config.per_device_train_batch_size": 1}).need().memory.total
    monkeypatch.setattr("phinetune.planning.setup.free_bytes", lambda device: least - 1000)
    found = make_plan(large(tmp_path), probe=False).nearest
    assert all("per_device_train_batch_size" not in as_options(one) or len(one) > 2 for one in found)
    monkeypatch.setattr("phinetune.planning.setup.free_bytes", lambda device: 1000)
    made = make_plan(large(tmp_path), probe=False)
    assert (made.fits, made.nearest) == (False, [])


def test_a_full_disk_is_told(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(chats, tmp_path / "run", save_strategy="steps", save_steps=2)
    made = make_plan(config, probe=False)
    assert made.disk == made.trainable * (4 + 3 * 12)
    config.training_config["save_total_limit"] = 1
    assert make_plan(config, probe=False).disk == made.trainable * (4 + 2 * 12)
    monkeypatch.setattr("phinetune.planning.plan.free_disk", lambda folder: made.trainable)
    assert not make_plan(config, probe=False).fits


def test_the_plain_engine_is_noted(chats: Path, tmp_path: Path) -> None:
    config = tiny_config(chats, tmp_path / "run")
    config.engine.kind = "plain"
    made = make_plan(config)
    assert made.seconds is None
    assert "engine: plain" in made.notes[0]


@pytest.mark.parametrize(("name", "size"), [("adamw_torch", 8), ("sgd", 0), ("adafactor", 8)])
def test_the_optimizer_is_counted_by_its_name(chats: Path, tmp_path: Path, name: str, size: int) -> None:
    made = make_plan(tiny_config(chats, tmp_path / "run", optim=name), probe=False)
    assert made.memory.optimizer == size * made.trainable
    assert any("adafactor" in note for note in made.notes) is (name == "adafactor")


def test_quantised_runs_are_measured_too(chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_config(chats, tmp_path / "run")
    config.model.quantization = "nf4"
    config.model.path = "random:{layers: 4, hidden_size: 64, intermediate_size: 128, heads: 4, kv_heads: 2, vocab: 320}"
    made = make_plan(config)
    assert made.seconds is not None
    assert made.seconds > 0


def test_a_plan_says_that_it_measured_beside_others() -> None:
    assert busy_sentence(Company(1.9, 2, 2)) == (
        "other programs use 1.9 of 2 cores: the time was measured beside them, and a quiet machine takes less"
    )
    assert busy_sentence(Company(0.1, 2, 2)) is None
    assert busy_sentence(None) is None
