"""Checks of the numbers and switches that a LoRA layer is made with."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any


def check_arguments(r: Any, lora_alpha: Any, lora_dropout: Any, switches: Mapping[str, Any]) -> None:
    """Refuse values with which a layer would compute something else than was meant.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not _is_whole(r) or r < 0:
        raise ValueError(f"r must be 0 (no adapter) or more, a whole number, not {r!r}")
    if not _is_number(lora_alpha) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, not {lora_alpha!r}")
    if not _is_number(lora_dropout) or not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must lie in [0, 1), not {lora_dropout!r}")
    for name, value in switches.items():
        check_switch(name, value)


def check_switch(name: str, value: Any) -> None:
    """Refuse what is not a boolean. A word such as "False" would count as True.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not _is_switch(value):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_enable_lora(enable_lora: Any) -> None:
    """Refuse what is not a sequence of booleans. A word such as "q" would count as True.

    Raises:
        ValueError: naming the value.
    """
    if not isinstance(enable_lora, Sequence) or isinstance(enable_lora, str) or not all(map(_is_switch, enable_lora)):
        raise ValueError(f"enable_lora must be a list of True and False, one for each split, not {enable_lora!r}")
    if not enable_lora:
        raise ValueError("enable_lora is empty: give one boolean for each split")


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, (bool, str))


def _is_switch(value: Any) -> bool:
    """Whether it is a boolean, or 0 or 1, as older scripts write it."""
    return isinstance(value, int) and value in (0, 1)
