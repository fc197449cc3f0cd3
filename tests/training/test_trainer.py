"""Checkpoints appear whole or not at all; packed chats don't see each other; nothing is sent anywhere."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from helpers import tiny_config, train_only
from phinetune.checkpoints.load import Loaded
from phinetune.errors import RunError
from phinetune.training.objectives.sft import PlainSftTrainer
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.run import open_place, train_run
from phinetune.training.trainer import RunTrainer, _means

# What the libraries raise where a disk fails: of Python's files, of safetensors, and of torch's zip writer.
FULL = [
    (OSError(errno.ENOSPC, "No space left on device"), "no space is left"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
    (OSError(errno.EFBIG, "File too large"), "past the limit of file sizes"),
    (OSError(errno.EIO, "Input/output error"), "the disk reports an error"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space is left"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 33152 vs 33044"), "is full, or reports"),
]


@pytest.mark.parametrize(("error", "said"), FULL, ids=str)
def test_a_save_that_fails_half_way_leaves_the_checkpoints_before(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    save = RunTrainer._save_rng_state

    def failing(self: RunTrainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise error
        save(self, output_dir)

    monkeypatch.setattr(RunTrainer, "_save_rng_state", failing)
    config = tiny_config(chats, tmp_path / "run", save_strategy="steps", save_steps=2, save_total_limit=1)
    with pytest.raises(RunError, match=f"{tmp_path / 'run'}: .*{said}.*checkpoints written before are whole"):
        train_only(config)
    left = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert left == {"checkpoint-2"}
    monkeypatch.undo()
    assert train_only(config, resume=True).summary["steps"] == 6


@pytest.mark.parametrize("most", [1_000, 4_000, 20_000, 30_000, 40_000])
def test_a_limit_of_file_sizes_is_a_sentence_whichever_library_meets_it(chats: Path, tmp_path: Path, most: int) -> None:
    """As under `ulimit -f`. Files of torch, safetensors and json are larger or smaller than these limits."""
    config = tiny_config(chats, tmp_path / "run", save_strategy="steps", save_steps=2)
    prepared, place = prepare_run(settle(config)), open_place(config)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(RunError, match=r"(limit of file sizes|could not be written to its end)"):
            train_run(prepared, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_is_not_seen_before_its_one_rename(
    chats: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def power_cut(stage: Path, target: Path) -> None:
        if Path(target).name.startswith("checkpoint-"):
            assert not Path(target).exists()
            raise OSError("power")
        rename(stage, target)

    monkeypatch.setattr("phinetune.files.os.replace", power_cut)
    with pytest.raises(OSError, match="power"):
        train_only(tiny_config(chats, tmp_path / "run", save_strategy="steps", save_steps=2))
    assert [p for p in (tmp_path / "run").iterdir() if p.is_dir()] == []


def test_nothing_is_sent_about_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PlainSftTrainer._send_telemetry is not SFTTrainer._send_telemetry
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: pytest.fail("telemetry was sent"))
    PlainSftTrainer._send_telemetry(object.__new__(PlainSftTrainer))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_chats_do_not_see_each_other(tiny: Loaded, attention: str) -> None:
    """Another first chat leaves the second one's logits the same to the bit."""
    tiny.model.set_attn_implementation(attention)
    first, other, second = [5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22]
    collate = DataCollatorForLanguageModeling(pad_token_id=259, padding_free=True)

    def logits(before: list[int]) -> torch.Tensor:
        batch: Any = collate([{"input_ids": ids, "labels": ids} for ids in (before, second)])
        with torch.no_grad():
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            return tiny.model(**inputs).logits[0, len(before) :]

    assert torch.equal(logits(first), logits(other))
    alone = tiny.model(torch.tensor([second])).logits[0]
    torch.testing.assert_close(logits(first), alone, rtol=1e-4, atol=1e-5)


def test_a_logged_mean_is_over_the_micro_batches_of_all_processes() -> None:
    """One of them may have had no chosen answer, and so no number of it."""
    assert _means([{"kl": [3.0, 2], "rewards/chosen": [1.0, 1]}, {"kl": [3.0, 1]}]) == {
        "kl": 2.0,
        "rewards/chosen": 1.0,
    }
    assert _means([{}, {}]) == {}
