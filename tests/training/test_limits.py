"""What the model or the device can't do is replaced, and a note says by what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config

from helpers import TINY, chat, tiny_config, train_only, write_jsonl
from phinetune.api.held_out import chats_of
from phinetune.api.plan import plan_config
from phinetune.api.train import train_config
from phinetune.errors import PhinetuneError
from phinetune.training.limits import limit_length, without_fp16
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.settings import read_settings

SHORT = f"{TINY[:-1]}, max_position_embeddings: 64}}"
SHAPE = Phi3Config(max_position_embeddings=64)


@pytest.mark.parametrize(("given", "said"), [(65, "65"), (4096, "4096"), (None, "no limit")])
def test_rows_end_with_the_models_positions(given: Any, said: str) -> None:
    settings = limit_length(read_settings({}, {"max_length": given}), SHAPE)
    assert settings.max_length == 64
    assert settings.notes == [
        f"training_config.max_length: {said} is more than the model has positions (max_position_embeddings: 64); 64 in "
        "its place"
    ]


def test_a_length_that_fits_stays() -> None:
    settings = read_settings({}, {"max_length": 64})
    assert limit_length(settings, SHAPE) is settings


def test_longer_rows_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [chat(f"Hi {i}", "Hello") for i in range(8)]
    long = [chat("Hi", "x" * 100), chat("Hi " * 9, "Hello", "Hi " * 9, "Hello")]
    file = write_jsonl(tmp_path / "chats.jsonl", [*rows, *long])
    config = tiny_config(file, tmp_path / "run", max_length=4096)
    config.data.eval = None
    config.model.path = SHORT
    prepared = prepare_run(settle(config))
    assert max(prepared.lengths) <= 64
    assert len(prepared.lengths) == 9
    assert prepared.settings.max_length == 64
    held_out = chats_of(config, str(file))  # `evaluate` on any file
    assert max(len(row["input_ids"]) for row in held_out.dataset()) <= 64


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_fp16_is_for_cuda(name: str) -> None:
    given = read_settings({}, {"fp16": True})
    settings = without_fp16(given, torch.device(name), torch.bfloat16)
    assert settings.training["fp16"] is False
    assert settings.notes == [
        f"training_config: `fp16` is for CUDA devices; on {name} the run trains in bfloat16, the weights' dtype"
    ]
    assert without_fp16(given, torch.device("cuda"), torch.float32) is given


def test_a_run_with_fp16_on_a_cpu_is_the_run_without(chats: Path, tmp_path: Path) -> None:
    with_it, without = (train_only(tiny_config(chats, tmp_path / str(value), fp16=value)) for value in (True, False))
    assert with_it.prepared.engine.fast is not None
    assert with_it.summary["train_loss"] == without.summary["train_loss"]
    assert "`fp16` is for CUDA devices" in (tmp_path / "True" / "run.log").read_text()


@pytest.mark.parametrize("way", [train_config, plan_config], ids=["train", "plan"])
def test_a_fixed_prompt_that_is_too_long_is_told_before_weights_are_loaded(
    tmp_path: Path, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("training.run", "planning.probe"):
        monkeypatch.setattr(f"phinetune.{place}.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    config = tiny_config(
        write_jsonl(tmp_path / "c.jsonl", [chat(f"Hi {i}", "Hello") for i in range(8)]), tmp_path / "r"
    )
    config.model.path = SHORT
    config.evaluation.fixed_prompts = ["Hi", "Hi " * 40]
    with pytest.raises(PhinetuneError, match="tokens, and the model has positions for 64"):
        way(config) if way is plan_config else way(config, None)
