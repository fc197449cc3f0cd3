"""Keys of an objective that scripts for TRL's preference trainers have in `training_config`.

`DPOConfig`, `ORPOConfig`, `CPOConfig` and `KTOConfig` hold the arguments of the training and the knobs of the objective
in one dictionary. Here the knobs move to the section `objective`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl import SFTConfig

from phinetune.config.objective import ObjectiveSection
from phinetune.config.run import RunConfig
from phinetune.errors import ConfigError
from phinetune.training.idle_keys import CUT
from phinetune.training.objectives.objective import Objective
from phinetune.training.objectives.registry import OBJECTIVES, make_objective, objective_kind

ONCE = "the reference is always computed once, before the first step"
START = "the reference is the model as it stands when the run starts"
# Keys that do nothing here, and why.
IDLE: Mapping[str, str] = {
    "precompute_ref_log_probs": ONCE,
    "precompute_ref_batch_size": ONCE,
    "precompute_ref_eval_batch_size": ONCE,
    "max_prompt_length": CUT,
    "max_completion_length": CUT,
    "max_target_length": CUT,
    "truncation_mode": CUT,
    "padding_value": "nothing is padded",
    "label_pad_token_id": "nothing is padded",
    "is_encoder_decoder": "a Phi-3 is a decoder",
    "generate_during_eval": "evaluation.fixed_prompts says what is answered during training",
    "model_adapter_name": START,
    "ref_adapter_name": START,
    "force_use_ref_model": START,
    "ref_model_init_kwargs": START,
    "ref_model_mixup_alpha": "it is for `sync_ref_model`",
    "ref_model_sync_steps": "it is for `sync_ref_model`",
    "tools": "a row's own tools go to the template",
    "use_logits_to_keep": "logits are only computed where there is a label",
    "use_liger_loss": "phinetune brings its own kernels",
    "base_model_attribute_name": "phinetune brings its own kernels",
    "f_alpha_divergence_coef": "it is for `f_divergence_type: alpha_divergence`",
}
# Keys that ask for what is not there, and the values with which they ask for nothing.
MISSING: Mapping[str, tuple[Any, ...]] = {
    "sync_ref_model": (False, None),
    "f_divergence_type": ("reverse_kl", "FDivergenceType.REVERSE_KL", None),
    "ld_alpha": (None,),
    "use_weighting": (False, None),
    "reference_free": (False, None),
}


def with_objective_keys(config: RunConfig) -> tuple[RunConfig, Objective, list[str]]:
    """The configuration with the objective's knobs in its own section, the objective, and lines for the log.

    Raises:
        ConfigError: a knob has two values, asks for what is not there, or the objective does not take it; the error
            lists all of them.
    """
    kind = objective_kind(config.objective)
    if kind.kind == "sft":
        _refuse_others(config.training_config)
        return config, make_objective(config.objective), []
    training, knobs = dict(config.training_config), config.objective.options
    problems: list[str] = []
    notes: list[str] = []
    _old_names(training, knobs, notes)
    for key in [key for key in training if key in kind.Options.model_fields]:
        value = training.pop(key)
        notes.append(f"training_config: `{key}` is taken as `objective.{key}`")
        if knobs.setdefault(key, value) != value:
            problems.append(
                f"training_config.{key} is {value!r}, and objective.{key} is {knobs[key]!r}; keep one of them"
            )
    for key in [key for key in training if key in MISSING or key in IDLE]:
        value = training.pop(key)
        if key in MISSING and str(value) not in map(str, MISSING[key]):
            problems.append(f"training_config.{key}: `{value}` is not there; leave the key out")
        elif key in IDLE and value not in (None, False):
            notes.append(f"training_config: `{key}` has no effect: {IDLE[key]}")
    if problems:
        raise ConfigError(problems)
    section = ObjectiveSection(kind=config.objective.kind, **knobs)
    objective = make_objective(section)
    changed = {
        "training_config": {**objective.training_defaults, **training},
        "peft_config": _without_dropout(config.peft_config, objective, notes),
        "objective": section,
    }
    return config.model_copy(update=changed), objective, notes


def _refuse_others(training: Mapping[str, Any]) -> None:
    """Refuse the knobs of preference objectives beside `sft`, which has none.

    Raises:
        ConfigError: there are some; it names the objectives that have each.
    """
    taken = {field.name for field in dataclasses.fields(SFTConfig)}
    owners = {
        key: ", ".join(name for name, kind in OBJECTIVES.items() if key in kind.Options.model_fields)
        for key in training
        if key not in taken
    }
    found = [f"training_config: `{key}` is for `objective: {names}`" for key, names in owners.items() if names]
    if found:
        raise ConfigError([f"{one}, and this run's objective is sft" for one in found])


def _without_dropout(peft: Mapping[str, Any], objective: Objective, notes: list[str]) -> dict[str, Any]:
    if not peft.get("lora_dropout") or not getattr(objective.options, "disable_dropout", False):
        return dict(peft)
    notes.append(
        f"peft_config: `lora_dropout: {peft['lora_dropout']}` has no effect: objective.disable_dropout is true, which "
        "is TRL's default"
    )
    return {**peft, "lora_dropout": 0.0}


def _old_names(training: dict[str, Any], knobs: dict[str, Any], notes: list[str]) -> None:
    """`rpo_alpha` of older versions of TRL is the weight of the chosen answers' likelihood beside the loss.

    Args:
        knobs: of the section `objective`, which may name the losses too.
    """
    alpha = training.pop("rpo_alpha", None)
    if alpha is None:
        return
    for key in ("loss_type", "loss_weights"):  # a knob that stands in both sections is told of afterwards
        if key in knobs and training.get(key, knobs[key]) == knobs[key]:
            training[key] = knobs.pop(key)
    losses = training.get("loss_type", "sigmoid")
    losses = [losses] if isinstance(losses, str) else list(losses)
    weights = training.get("loss_weights") or [1.0] * len(losses)
    training |= {"loss_type": [*losses, "sft"], "loss_weights": [*weights, alpha]}
    notes.append(f"training_config: `rpo_alpha` is retired: taken as the loss_type `sft` with the weight {alpha}")
