"""Tries a run's settings on a model without weights, so that what the libraries refuse is told before data is read."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, get_scheduler
from trl import SFTConfig

from phinetune.checkpoints.named_modules import check_patterns
from phinetune.engine.families import ModelConfig, plain_model
from phinetune.errors import ConfigError, told_as
from phinetune.training.beginning import check_beginning
from phinetune.training.optimizer_keys import unread_by_optimizer
from phinetune.training.settings import Settings, make_lora_config

STEPS = 1000  # of a schedule that is tried where a run's own number of steps is not known yet


def rehearse(settings: Settings, args: SFTConfig, shape: ModelConfig) -> list[str]:
    """Make the adapter, the optimizer and the schedule of a run, on torch's meta device where weights take no memory.

    Args:
        shape: the model's configuration.

    Returns:
        a line for each setting that the optimizer does not read.

    Raises:
        ConfigError: a library refuses a value or a combination, or an entry of `peft_config` matches nothing.
    """
    model = rehearse_adapter(settings, shape)
    rehearse_training(args, model)
    return unread_by_optimizer(settings.training, args, model)


def rehearse_adapter(settings: Settings, shape: ModelConfig) -> PeftModel:
    """The adapter's part of `rehearse`; returns the model with the adapter."""
    model = adapted_shape(settings, shape, torch.float32)
    check_patterns(model)
    check_beginning(model, settings.peft.get("init_lora_weights", True))
    return model


def rehearse_training(args: SFTConfig, model: PeftModel) -> None:
    """The optimizer's and the schedule's part of `rehearse`."""
    with told_as(ConfigError, "training_config.optim, optim_args"):
        _make_optimizer(args, model)
    with told_as(ConfigError, "training_config.lr_scheduler_type, lr_scheduler_kwargs"):
        _make_schedule(args)


def adapted_shape(settings: Settings, shape: ModelConfig, dtype: torch.dtype) -> PeftModel:
    """The model with its adapter on the meta device.

    Raises:
        ConfigError: PEFT can't put such an adapter on such a model.
    """
    with torch.device("meta"):
        model = plain_model(shape, dtype=dtype)
        lora = make_lora_config(settings, model)
        lora.init_lora_weights = False  # there are no weights to begin with
        with told_as(ConfigError, "peft_config"):
            adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    return adapted


def _make_optimizer(args: SFTConfig, model: PeftModel) -> None:
    """As the trainer makes it, for one small parameter; optimizers that choose parameters by name get those."""
    whole: Any = model  # as the trainer gives it; transformers' annotation knows no adapters
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, whole)
    parameters = options.pop("params", [nn.Parameter(torch.zeros(1))])
    if isinstance(kind, type) and not {"model", "optimizer_dict"} & options.keys():
        kind(parameters, **options)


def _make_schedule(args: SFTConfig) -> None:
    options: Any = args.lr_scheduler_kwargs  # a text is a dictionary by now
    steps = args.max_steps if args.max_steps > 0 else STEPS
    get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )
