"""Turns what the libraries raise while a run trains into sentences. A fault of this package stays a traceback."""

from __future__ import annotations

import logging
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phinetune.errors import (
    LOST_PROCESS,
    ConfigError,
    LostProcess,
    MachineError,
    PhinetuneError,
    is_lost,
    is_out_of_memory,
    reason_of,
)
from phinetune.files import disk_trouble

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# Files whose functions stand between two calls of a library: they hand on what the user gave.
PASSAGES = {
    PACKAGE / "training" / name for name in ("run.py", "trainer.py", "saving.py", "going_on.py", "library_errors.py")
}
# Where libraries lie. Whatever else is in a traceback is the caller's own code.
INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
LIBRARIES = ("transformers", "peft", "trl", "torch", "accelerate", "bitsandbytes", "datasets", "safetensors")
LESS_MEMORY = (
    "lower training_config.per_device_train_batch_size or max_length, set engine.activation_memory: all or "
    "model.quantization: nf4; `phinetune plan` tells what fits"
)


@contextmanager
def told_in_sentences() -> Iterator[None]:
    """A context in which the libraries work with the user's settings: making a trainer, training.

    An error becomes a sentence if a library raised it and none of this package's own computations called the library.
    Whatever is raised because memory ran out becomes one, too.

    Raises:
        ConfigError: a library refuses the settings, or what they lead to.
        LostProcess: another process of the run is gone.
        MachineError: the memory is not enough.
    """
    try:
        yield
    except PhinetuneError:
        raise
    except Exception as error:
        if disk_trouble(error):
            raise  # whoever knows the folder tells it
        if is_out_of_memory(error):
            raise MachineError(
                f"the memory is not enough for this run ({reason_of(error)}); {LESS_MEMORY}. Checkpoints written "
                "before are whole, and --resume goes on from them"
            ) from error
        if is_lost(error):
            raise LostProcess(LOST_PROCESS) from error
        library = _library_of(error)
        if library is None:
            raise
        logger.debug("raised by %s", library, exc_info=error)
        raise ConfigError(
            f"training_config or peft_config: {library} refuses these settings: {reason_of(error)}"
        ) from error


@contextmanager
def disk_told(folder: Path) -> Iterator[None]:
    """A context in which a run's folder is written. What a disk reports becomes a sentence with the folder's name.

    Raises:
        MachineError: the disk is full, at a limit, or fails.
    """
    try:
        yield
    except PhinetuneError:
        raise
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        raise MachineError(
            f"{folder}: {trouble}, so the run stopped; checkpoints written before are whole. See to the disk and go on "
            "with --resume"
        ) from error


def _library_of(error: BaseException) -> str | None:
    """The library that raised an error by itself; None if this package did, or computed something in between."""
    files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    own = {file for file in files if file.is_relative_to(PACKAGE)}
    if files[-1] in own or not own <= PASSAGES or not any(files[-1].is_relative_to(place) for place in INSTALLED):
        return None
    parts = next((file.parts for file in reversed(files) if set(file.parts) & set(LIBRARIES)), ())
    return next((name for name in LIBRARIES if name in parts), None)
