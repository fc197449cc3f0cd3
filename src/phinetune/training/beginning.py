"""Saves an adapter that began by changing its base as a plain LoRA adapter for the base as it is.

PiSSA and OLoRA set A and B to a part of a weight W, and take this part out of the base: W₀ = W − s·B₀A₀. The trained
model is W₀ + s·BA = W + s·(BA − B₀A₀), which is the base as it is with the adapter [A; A₀], [B, −B₀] of twice the rank.
So every folder that a run writes holds this adapter, and any program can load it. Training goes on from its first half.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phinetune.engine.peft_variants import changes_the_base, refused_starts, start_notes
from phinetune.errors import ConfigError, RunError, at_most
from phinetune.training.settings import Settings

AXES = {"lora_A": 0, "lora_B": 1}  # the dimension of a saved tensor that counts the ranks


def settle_start(settings: Settings, quantization: str) -> Settings:
    """The settings, with a line for what the adapter's beginning means to the user.

    Args:
        quantization: `model.quantization`.

    Raises:
        ConfigError: the run can't begin as `peft_config` asks; the error lists all problems.
    """
    problems = refused_starts(settings.peft, quantization)
    if problems:
        raise ConfigError(problems)
    return replace(settings, notes=[*settings.notes, *start_notes(settings.peft)])


@dataclass(frozen=True)
class Beginning:
    """What A and B were before the first step, of an adapter that changed its base.

    Attributes:
        tensors: A₀ and B₀ of each layer, by the names under which A and B are saved.
    """

    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: PeftModel) -> Beginning | None:
        """The beginning of an untrained adapter; None if it left its base as it is."""
        if not changes_the_base(vars(model.peft_config["default"])["init_lora_weights"]):
            return None
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
        return cls({name: saved[name].detach().cpu().clone() for name in saved if _axis(name) is not None})

    def widen(self, folder: Path) -> None:
        """Rewrite the adapter that PEFT has just saved in `folder` as the plain adapter of twice the rank."""
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        for name, first in self.tensors.items():
            axis = _axis(name) or 0
            tensors[name] = torch.cat([tensors[name], -first if axis else first], dim=axis)
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        file = folder / ADAPTER_CONFIG
        tree = _widened(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(tree, indent=2, sort_keys=True), encoding="utf-8")

    def load(self, folder: Path, model: PeftModel) -> None:
        """Set the adapter of `model`, which began in the same way, to the one that `widen` left in `folder`.

        Raises:
            RunError: the adapter in `folder` began in another way.
        """
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        unlike = []
        for name, first in self.tensors.items():
            axis = _axis(name) or 0
            halves = tensors[name].chunk(2, dim=axis) if name in tensors else ()
            if len(halves) == 2 and torch.equal(halves[1], -first if axis else first):
                tensors[name] = halves[0].contiguous()
            else:
                unlike.append(name)
        if unlike:
            raise RunError(
                [
                    f"{folder}: its adapter began with other values than this one, so training can't go on there "
                    "(another seed, device or version computes them differently); start a new run instead",
                    *at_most(unlike, 4),
                ]
            )
        set_peft_model_state_dict(model, tensors, adapter_name="default")


def _axis(name: str) -> int | None:
    """The dimension of a saved tensor that counts the ranks; None if the tensor is neither A nor B."""
    return next((axis for part, axis in AXES.items() if name.endswith(f".{part}.weight")), None)


def _widened(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with twice the rank and the same scaling, for an adapter that left its base as it is."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2  # the scaling is alpha / √r, or alpha / r
    return {
        **config,
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def check_beginning(model: PeftModel, init_lora_weights: object) -> None:
    """Make sure that every layer of an adapter can begin as `init_lora_weights` says. No weights are needed for it.

    Raises:
        ConfigError: layers can't begin so; the error lists them.
    """
    if init_lora_weights in (True, False, "gaussian"):
        return
    problems = []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.r:
            problem = _why_not_begun(layer, layer.r["default"], str(init_lora_weights))
            problems += [f"{name}: {problem}"] if problem else []
    if problems:
        raise ConfigError([f"peft_config.init_lora_weights: `{init_lora_weights}`:", *at_most(problems, 8)])


def _why_not_begun(layer: LoraLayer, rank: int, start: str) -> str | None:
    most = min(int(layer.in_features or 0), int(layer.out_features or 0))
    if "default" in layer.lora_embedding_A and start != "mica":
        return "an embedding, and only linear layers can begin so"
    if start == "orthogonal":
        return f"the rank is {rank}, and it must be even" if rank % 2 else None
    return f"the rank is {rank}, and its weight has a rank of {most} at most" if rank > most else None
