"""Which layers get a LoRA adapter, and how a saved adapter is loaded onto its base."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from phinetune.checkpoints.load import Base, Loaded
from phinetune.engine.choice import has_packed_form
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.errors import ConfigError, ModelError, at_most

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"
ALL_LINEAR = "all-linear"

# The cookbook's examples name the split projections of other models. Phi-3 has them fused into one layer.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclasses.dataclass(frozen=True)
class AdaptedLayers:
    """Linear layers of the same name and shape that have an adapter.

    Attributes:
        name: the last part of the layers' names.
        count: how many layers there are.
        in_features, out_features: the shape of each layer's weight is (out_features, in_features).
        rank: the adapter's rank r.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    rank: int

    @property
    def parameters(self) -> int:
        """The number of parameters of A (r × in) and B (out × r) in all `count` layers together."""
        return self.count * self.rank * (self.in_features + self.out_features)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its full name. The output head is left out, because it gets no adapter."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def resolve_targets(model: nn.Module, wanted: Any) -> Any:
    """Translate `target_modules` into names of this model's layers.

    Args:
        wanted: a list of names, a regular expression, `all-linear`, or None.

    Returns:
        a list in which Phi-3's fused names replace split ones, the regular expression, or `all-linear` (also for None).

    Raises:
        ConfigError: a name or the pattern matches no linear layer, or the pattern matches the output head.
    """
    if wanted is None or wanted == ALL_LINEAR:
        return ALL_LINEAR
    layers = linear_layers(model)
    last_names = {name.rsplit(".", 1)[-1] for name in layers}
    if isinstance(wanted, str):
        return _resolve_pattern(wanted, layers, last_names, _head_name(model))
    names = list(dict.fromkeys(_fused_name(name, last_names) for name in wanted))
    problems = [
        f"peft_config.target_modules: `{name}` matches no linear layer; there are {', '.join(sorted(last_names))}"
        for name in names
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers)
    ]
    if problems or not names:
        raise ConfigError(problems or "peft_config.target_modules: the list is empty")
    return names


def _head_name(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, layer in model.named_modules() if layer is head), None)


def _resolve_pattern(pattern: str, layers: Mapping[str, nn.Linear], last_names: set[str], head: str | None) -> str:
    try:
        matched = any(re.fullmatch(pattern, name) for name in layers)
        # The loss reads the head's weight directly, so an adapter on the head would do nothing.
        if head and re.fullmatch(pattern, head):
            raise ConfigError(
                f"peft_config.target_modules: the pattern `{pattern}` matches {head}, and the head is not adapted"
            )
    except re.error as error:
        raise ConfigError(f"peft_config.target_modules: `{pattern}` is no regular expression: {error}") from None
    if not matched:
        raise ConfigError(
            f"peft_config.target_modules: the pattern `{pattern}` matches no linear layer; there are "
            f"{', '.join(sorted(last_names))} (a list of names is written with brackets)"
        )
    return pattern


def _fused_name(name: str, last_names: set[str]) -> str:
    path, _, last = name.rpartition(".")
    if last in last_names or FUSED.get(last) not in last_names:
        return name
    return f"{path}.{FUSED[last]}".lstrip(".")


def matched_targets(model: PeftModel) -> list[AdaptedLayers]:
    """The layers of a model that have an adapter, grouped by name and shape."""
    from peft.tuners.lora import LoraLayer

    counts: dict[tuple[str, int, int, int], int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            rank = next(iter(layer.r.values()))
            fan_in, fan_out = int(layer.in_features or 0), int(layer.out_features or 0)
            key = (name.rsplit(".", 1)[-1], fan_in, fan_out, rank)
            counts[key] = counts.get(key, 0) + 1
    return [
        AdaptedLayers(name, count, fan_in, fan_out, rank) for (name, fan_in, fan_out, rank), count in counts.items()
    ]


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters, and the number of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def read_base(folder: Path) -> Base | None:
    """The base that is recorded beside an adapter. None for an adapter that another tool wrote.

    Raises:
        ModelError: the record can't be read.
    """
    file = folder / BASE_FILE
    if not file.is_file():
        return None
    try:
        return Base(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: broken: {error}") from None


def check_base(base: Base, folder: Path) -> None:
    """Make sure that the adapter in `folder` was trained on `base`. Accepts an adapter without a record of its base.

    Raises:
        ModelError: the adapter was trained on another base.
    """
    recorded = read_base(folder)
    if recorded and recorded.fingerprint != base.fingerprint:
        raise ModelError(
            f"{folder}: this adapter was trained on {_describe(recorded)}, but the base that is loaded is "
            f"{_describe(base)}, another model; load the adapter on the base it was trained on"
        )


def attach_adapter(loaded: Loaded, folder: Path) -> PeftModel:
    """Load the adapter in `folder` onto its base. The model is in evaluation mode.

    Raises:
        ModelError: the folder holds no adapter, the adapter belongs to another base, or its tensors don't fit this
            base; the error names all of them.
    """
    check_base(loaded.base, folder)
    config = read_adapter_config(folder)
    if has_packed_form(loaded.model):
        use_fused_layers(config, loaded.model)
    model = PeftModel(loaded.model, config)
    _check_tensors(model, folder)
    model.load_adapter(str(folder), "default", is_trainable=False)
    return model.eval()


def read_adapter_config(folder: Path) -> LoraConfig:
    """The `LoraConfig` of an adapter folder.

    Raises:
        ModelError: the folder holds no adapter, or one that is not LoRA.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder}: no adapter there (expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: not a LoRA configuration: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: a {config.peft_type} adapter; only LoRA is supported")
    config.inference_mode = True
    return config


def _check_tensors(model: PeftModel, folder: Path) -> None:
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: damaged: {error}") from None
    problems = [f"missing: {name}" for name in expected if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in expected]
    problems += [
        f"{name}: adapter shape {saved[name]} does not match the model's {shape}"
        for name, shape in expected.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        raise ModelError([f"{folder}: the adapter does not fit this base:", *at_most(problems, 8)])


def _describe(base: Base) -> str:
    revision = f" at {base.revision[:12]}" if base.revision else ""
    return f"{base.path}{revision} (fingerprint {base.fingerprint[:12]})"
