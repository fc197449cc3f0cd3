"""What a checkpoint vouches for, which one is the best after a resume, and what replaces a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import tiny_config, train_only
from phinetune.config.run import RunConfig
from phinetune.errors import RunError
from phinetune.manifest import MANIFEST, damage
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.run import TrainedRun, open_place, train_run


def config_of(chats: Path, folder: Path, **training: Any) -> RunConfig:
    return tiny_config(chats, folder, **{"save_strategy": "steps", "save_steps": 2, **training})


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(tensor, adapter(b)[name]) for name, tensor in adapter(a).items())


@pytest.fixture(scope="module")
def whole(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2, 4 and 6. Copy it; don't write into it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_only(config_of(chats, folder))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_checkpoints_and_the_run_itself_vouch_for_all_their_files(run: Path) -> None:
    for folder in (run / "checkpoint-2", run / "checkpoint-6"):
        listed = json.loads((folder / MANIFEST).read_text())["files"].keys()
        assert listed == {file.name for file in folder.iterdir()} - {MANIFEST}
        assert damage(folder) == []
    listed = json.loads((run / MANIFEST).read_text())["files"].keys()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "base.json"} <= set(listed)
    assert damage(run) == []


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.pt", flip),
        ("adapter_model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:100])),
        ("rng_state.pth", Path.unlink),
        ("trainer_state.json", lambda file: file.write_text("")),
    ],
)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_bits(
    chats: Path, whole: Path, run: Path, name: str, harm: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    harm(run / "checkpoint-6" / name)
    assert train_only(config_of(chats, run), resume=True).summary["steps"] == 6
    assert f"checkpoint-6 is not used, since {name}" in caplog.text
    assert same(run, whole)
    assert damage(run / "checkpoint-6") == []  # written again
    assert (run / "checkpoint-6" / name).stat().st_size == (whole / "checkpoint-6" / name).stat().st_size


@pytest.mark.parametrize(
    ("name", "harm", "goes_on"),
    [
        ("", lambda folder: None, "checkpoint-6"),
        ("optimizer.pt", flip, "checkpoint-4"),
        ("scheduler.pt", lambda file: file.write_bytes(file.read_bytes()[:-40]), "checkpoint-4"),
        ("rng_state.pth", lambda file: file.write_bytes(b""), "checkpoint-4"),
        ("adapter_model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1]), "checkpoint-4"),
        ("trainer_state.json", lambda file: file.write_text("{"), "checkpoint-4"),
    ],
)
def test_a_checkpoint_of_an_older_version_is_read_and_said_not_to_be_verified(
    chats: Path,
    run: Path,
    name: str,
    harm: Callable[[Path], object],
    goes_on: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for folder in run.glob("checkpoint-*"):
        (folder / MANIFEST).unlink()
    harm(run / "checkpoint-6" / name)
    place = open_place(config_of(chats, run), resume=True)
    assert place.checkpoint == run / goes_on
    assert f"{goes_on} is of an older version and has no manifest.json" in caplog.text


# ---- the best checkpoint


BEST = {
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # asks for the worst, which is early, so that best and last differ
}


def best_step(trained: TrainedRun) -> int:
    return int(trained.summary["best"]["step"])


@pytest.fixture(scope="module")
def with_best_once(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its last checkpoint: its best one is not loaded yet."""
    folder = tmp_path_factory.mktemp("best") / "run"
    made = train_only(config_of(chats, folder, **BEST))
    assert best_step(made) < 6
    (folder / "best.txt").write_text(str(best_step(made)))
    (folder / "adapter_model.safetensors").unlink()
    return folder


@pytest.fixture
def with_best(with_best_once: Path, tmp_path: Path) -> tuple[Path, int]:
    """A copy of it elsewhere; the first one is still where the state says that the best checkpoint is."""
    folder = Path(shutil.copytree(with_best_once, tmp_path / "moved"))
    return folder, int((folder / "best.txt").read_text())


@pytest.mark.parametrize("last", [6, 5, 4])
def test_the_best_checkpoint_is_loaded_wherever_the_run_has_gone(
    chats: Path, with_best: tuple[Path, int], last: int
) -> None:
    folder, best = with_best
    for step in range(last + 1, 7):
        shutil.rmtree(folder / f"checkpoint-{step}")
    weights = load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    made = train_only(config_of(chats, folder, **BEST), resume=True)
    assert made.summary["best"] == {**made.summary["best"], "step": best, "loaded": True}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter(folder).items())
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert last == 6 or state["best_model_checkpoint"] == str(folder / f"checkpoint-{best}")


@pytest.mark.parametrize("last", [6, 5])
@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied", "gone"])
def test_a_best_checkpoint_that_can_not_be_used_is_told_and_no_other_is_named_as_loaded(
    chats: Path, with_best: tuple[Path, int], last: int, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, best = with_best
    for step in range(last + 1, 7):
        shutil.rmtree(folder / f"checkpoint-{step}")
    file = folder / f"checkpoint-{best}" / "adapter_model.safetensors"
    if harm != "gone":
        if harm == "flipped":
            flip(file)
        else:
            file.write_bytes(file.read_bytes()[: 50 if harm == "cut" else 0])
        with pytest.raises(
            RunError, match=r"the best checkpoint up to here, .* adapter_model\.safetensors .*; delete it"
        ):
            train_only(config_of(chats, folder, **BEST), resume=True)
        assert not (folder / "adapter_model.safetensors").exists()
    shutil.rmtree(file.parent)
    made = train_only(config_of(chats, folder, **BEST), resume=True)
    assert made.summary["best"]["loaded"] is False
    assert f"checkpoint-{best}, the best checkpoint up to here, is not there" in caplog.text
    assert same(folder, folder / "checkpoint-6")


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_run_that_stopped_early_is_not_trained_on(
    chats: Path, tmp_path: Path, patience: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the machine went down during the comparison after training."""
    config = config_of(chats, tmp_path / "run", **BEST)
    config.evaluation.early_stopping_patience = patience
    first = train_only(config)
    assert first.summary["stopped_early"]
    steps = first.summary["steps"]
    assert steps < 6
    before = adapter(tmp_path / "run")
    with caplog.at_level("INFO", logger="phinetune"):
        again = train_only(config, resume=True)
    assert (again.summary["steps"], again.summary["stopped_early"]) == (steps, True)
    assert again.summary["best"] == first.summary["best"]
    assert f"stopped early at step {steps}: nothing more is trained" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(tmp_path / "run").items())
    (tmp_path / "run" / "results.json").write_text(json.dumps({"training": again.summary}))
    with pytest.raises(RunError, match=f"stopped early at step {steps}"):
        train_only(config, resume=True)
    config.evaluation.early_stopping_patience = None
    assert train_only(config, resume=True, changed=True).summary["steps"] == 6


# ---- a run that replaces another


class Dies(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "stays"), [(1, "old"), (2, "old"), (3, "new"), (5, "new")])
def test_a_replacement_that_dies_leaves_the_old_run_or_one_that_goes_on(
    chats: Path, whole: Path, run: Path, step: int, stays: str
) -> None:
    other = config_of(chats, run, learning_rate=0.5)
    with pytest.raises(KeyboardInterrupt):
        train_run(prepare_run(settle(other)), open_place(other, overwrite=True), callbacks=[Dies(step)])
    if stays == "old":
        place = open_place(config_of(chats, run), resume=True)
        assert place.checkpoint == run / "checkpoint-6"
        assert same(run, whole)
        assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    else:
        assert train_only(other, resume=True).summary["steps"] == 6
        assert not same(run, whole)
    assert not (run / ".replaced").exists()


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_replacement_that_ends_leaves_nothing_of_the_old_run(chats: Path, run: Path, strategy: str) -> None:
    train_only(config_of(chats, run, max_steps=3, save_strategy=strategy), overwrite=True)
    left = {place.name for place in run.iterdir() if place.is_dir()}
    assert left == ({"checkpoint-2", "checkpoint-3"} if strategy == "steps" else set())
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
