"""How the weights of a model that only answers lie in memory: as training has them, or in fewer bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from phinetune.checkpoints.weight_files import held_tensors
from phinetune.checkpoints.whole import HARMLESS
from phinetune.config.answer_weights import AUTO, Q8
from phinetune.config.model import ModelSection
from phinetune.engine.families import ModelConfig
from phinetune.engine.half_linear import lie_in_half
from phinetune.engine.kernels import few_rows, q8
from phinetune.engine.phi3 import missing_form
from phinetune.engine.q8_linear import Q8Linear, lie_in_q8
from phinetune.errors import ConfigError

logger = logging.getLogger(__name__)


def check_q8(section: ModelSection, device: torch.device, config: ModelConfig | None = None, fast: bool = True) -> None:
    """Make sure that the base which `section` names can lie in q8_0.

    Args:
        config: its configuration; None while that is not known.
        fast: whether it is loaded for the fast engine.

    Raises:
        ConfigError: it can't.
    """
    missing = missing_form(config) if config else None
    problems = [
        *([f"{section.path} lies on {device}, and q8_0 is for CPUs"] if device.type != "cpu" else []),
        *([f"{section.path} is held in {section.quantization} already"] if section.quantization != "none" else []),
        *([f"{section.path} has {missing}, which the fast engine has no form for"] if missing else []),
        *(["engine.kind is plain, and q8_0 is of the fast engine"] if not fast else []),
    ]
    if problems:
        raise ConfigError([f"weights: q8_0: {problem}; leave it out" for problem in problems])


def read_dtype(weights: str | None, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to read a checkpoint in, for products in `dtype`. What is rounded to eight bits is so but once."""
    if weights == Q8:
        return _held_in(folder)
    halves = weights == AUTO and dtype == torch.float32 and device.type == "cpu" and few_rows.reads_half()
    return torch.bfloat16 if halves and _held_in(folder) == torch.bfloat16 else dtype


def lay(model: Any, weights: str | None, dtype: torch.dtype) -> None:
    """Let the weights of a model's linear layers lie as wanted, for products in `dtype`."""
    if weights == Q8:
        lie_in_q8(model, dtype)
        if not q8.is_native(dtype):
            logger.warning(
                "weights: q8_0: no kernel multiplies them as they lie with %s on this machine, so each step expands "
                "all of them; that saves memory and takes longer",
                str(dtype).removeprefix("torch."),
            )
    elif model.dtype != dtype:
        lie_in_half(model)


def how_held(model: Any) -> str:
    """How the weights of a model's linear layers lie, for the log."""
    head = model.get_output_embeddings()
    return Q8 if isinstance(head, Q8Linear) else str(head.weight.dtype)


def _held_in(folder: Path) -> torch.dtype:
    """The dtype of all weights in a checkpoint's files; float32, which holds them all, if there are several."""
    found = {one.dtype for name, one in held_tensors(folder).items() if not HARMLESS.search(name)}
    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    return halves.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
