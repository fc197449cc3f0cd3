"""Finds out which of a run's settings its optimizer does not read: transformers passes them over in silence."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, Trainer
from trl import SFTConfig

from phinetune.training.value_rules import plain_name

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
OTHERS = ("0.123", "7", "true", "bfloat16")  # values that are tried: one of them changes what is read


def unread_by_optimizer(given: Mapping[str, Any], args: SFTConfig, model: Any) -> list[str]:
    """A line for each setting that the run's optimizer does not read.

    Args:
        given: `training_config`, validated.
        args: TRL's arguments made of it. transformers can make an optimizer of them.
        model: the model with its adapter.
    """
    now = _options(args, model)
    unread = [key for key in ADAM if key in given and _options(args, model, **{key: 0.123}) == now]
    lines = [f"training_config: `{key}` has no effect: `optim: {_name(args)}` does not read it" for key in unread]
    bare = _options(args, model, optim_args=None)
    for key in _keys(args.optim_args):
        if all(_options(args, model, optim_args=f"{key}={other}") == bare for other in OTHERS):
            lines.append(f"training_config.optim_args: `{key}` has no effect: `optim: {_name(args)}` does not read it")
    return lines


def _keys(optim_args: str | None) -> list[str]:
    return [pair.partition("=")[0].strip() for pair in (optim_args or "").split(",") if pair.strip()]


def _name(args: SFTConfig) -> str:
    return plain_name(args.optim)


def _options(args: SFTConfig, model: PreTrainedModel, **changes: Any) -> str:
    """What transformers makes an optimizer with, as text, or why it can't."""
    changed = copy.copy(args)
    for key, value in changes.items():
        setattr(changed, key, value)
    try:
        return repr(Trainer.get_optimizer_cls_and_kwargs(changed, model)[1])
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # a value that is tried was read, and refused
        return repr(error)
