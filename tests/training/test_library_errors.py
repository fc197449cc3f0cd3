"""What a library raises for a user's settings is a sentence; a fault of this package stays a traceback."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, get_scheduler

from helpers import tiny_config
from phinetune.engine.packing import PackedCollator
from phinetune.errors import ConfigError, DataError, RunError
from phinetune.files import disk_trouble
from phinetune.training.library_errors import disk_told, told_in_sentences
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.run import open_place, train_run


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 5 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("could not create a primitive"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_too_little_memory_says_what_to_do(error: Exception) -> None:
    with pytest.raises(RunError) as caught, told_in_sentences():
        raise error
    for remedy in ("per_device_train_batch_size", "activation_memory: all", "nf4", "phinetune plan"):
        assert remedy in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_real_allocation_that_fails_is_such_an_error() -> None:
    with pytest.raises(RunError, match="the memory is not enough"), told_in_sentences():
        torch.empty(1 << 60, dtype=torch.float32)


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("torch", lambda: torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=-1.0)),
        ("torch", lambda: torch.utils.data.DataLoader([], num_workers=-1)),  # type: ignore[arg-type]
        ("transformers", lambda: get_scheduler("cosine", optimizer=None)),  # type: ignore[arg-type]
        ("peft", lambda: get_peft_model(nn.Linear(2, 2), LoraConfig(target_modules=["no_such"]))),  # type: ignore[arg-type]
    ],
)
def test_a_library_that_refuses_is_named(library: str, call: Any) -> None:
    with pytest.raises(ConfigError, match=f"{library} refuses these settings: ."), told_in_sentences():
        call()


def test_a_sentence_stays_as_it_is() -> None:
    with pytest.raises(DataError, match=r"^row 3$"), told_in_sentences():
        raise DataError("row 3")


def test_a_fault_of_this_package_stays_a_traceback() -> None:
    """Here torch refuses what our own collator hands to it."""
    with pytest.raises(KeyError), told_in_sentences():
        PackedCollator(share=False, rope_limit=None)([{"labels": [1]}])


def test_an_error_in_the_code_of_a_caller_stays_a_traceback(chats: Path, tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("mine")

    prepared = prepare_run(settle(tiny_config(chats, tmp_path / "run")))
    with pytest.raises(ZeroDivisionError, match="mine"):
        train_run(prepared, open_place(prepared.config), callbacks=[Fails()])


@pytest.mark.parametrize(
    "training",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0, "no_such": 2}},
        {"optim_args": "no_such_argument"},
        {"report_to": "comet_ml"},
    ],
    ids=str,
)
def test_what_a_library_finds_while_a_run_trains_is_a_sentence(
    chats: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    config = tiny_config(chats, tmp_path / "run", **training)
    with pytest.raises(ConfigError):
        train_run(prepare_run(settle(config)), open_place(config))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "can only be read"),
        (RuntimeError("basic_ios::clear: iostream error"), "could not be written to its end"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "to its end"),
        (ValueError("cut"), None),
        (OSError(errno.ENOENT, "No such file"), None),
    ],
    ids=str,
)
def test_a_disk_that_fails_is_told_with_the_folder(error: Exception, said: str | None) -> None:
    with pytest.raises(RunError if said else type(error)) as caught, disk_told(Path("runs/mine")), told_in_sentences():
        raise error
    if said:
        assert str(caught.value).startswith("runs/mine: ")
        assert said in str(caught.value)
        assert "--resume" in str(caught.value)


def test_what_says_more_comes_first_in_a_chain_of_errors() -> None:
    """torch's error about the file that is cut off is raised while the system's own is handled."""
    error = RuntimeError("unexpected pos 1 vs 0")
    error.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert disk_trouble(error) == "the disk quota is used up"


def test_a_sentence_about_something_else_keeps_its_words() -> None:
    with pytest.raises(DataError, match=r"^row 3$"), disk_told(Path("runs/mine")):
        raise DataError("row 3") from OSError(errno.ENOSPC, "No space left on device")
