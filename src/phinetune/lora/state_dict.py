"""Mark what trains, and save and load only the adapters.

Two functions are loralib's. The loader, `load_lora_state_dict`, is added: it reports everything that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phinetune.lora.base import LoRALayer
from phinetune.lora.conv import LORALIB_PREFIX, _ConvBase

BIASES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all parameters except the adapters and the chosen biases.

    Args:
        bias: which biases train. `none`; `all`: those of the whole model; `lora_only`: those of adapted layers.

    Raises:
        ValueError: `bias` is none of these.
    """
    _check_bias(bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or (bias == "all" and "bias" in name)
    if bias == "lora_only":
        # A bias that two layers share has two names, and named_parameters() above gives only one of them.
        for name in _lora_biases(model):
            model.get_parameter(name).requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The tensors to save: the adapters and the chosen biases, under loralib's names.

    Args:
        bias: as in `mark_only_lora_as_trainable`.

    Raises:
        ValueError: `bias` is none of these.
    """
    _check_bias(bias)
    chosen = _lora_biases(model) if bias == "lora_only" else set()
    layers = model.named_modules(remove_duplicate=False)
    convolutions = {name for name, layer in layers if isinstance(layer, _ConvBase)}
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            kept[name] = tensor
        elif (bias == "all" and "bias" in name) or name in chosen:
            layer, _, last = name.rpartition(".")
            kept[f"{layer}.{LORALIB_PREFIX}{last}".lstrip(".") if layer in convolutions else name] = tensor
    return kept


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load into a pretrained model what `lora_state_dict` saved, here or in loralib.

    If a tensor does not fit, nothing is loaded.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape. The message names them all.
    """
    renamed = {_torch_name(model, name): tensor for name, tensor in state.items()}
    there = model.state_dict()
    wanted = {name for name in there if "lora_" in name}
    problems = [f"missing: {name}" for name in sorted(wanted - renamed.keys())]
    problems += [f"unexpected: {name}" for name in sorted(renamed.keys() - there.keys())]
    problems += [
        f"{name}: shape {tuple(tensor.shape)} does not match the model's {tuple(there[name].shape)}"
        for name, tensor in renamed.items()
        if name in there and tensor.shape != there[name].shape
    ]
    if problems:
        raise ValueError("the adapters don't fit the model:\n" + "\n".join(problems))
    with torch.no_grad():
        model.load_state_dict(renamed, strict=False)


def _torch_name(model: nn.Module, name: str) -> str:
    """The name in this package of a parameter that loralib may have named: its convolutions say `conv.weight`."""
    layer, _, last = name.rpartition(f".{LORALIB_PREFIX}")
    if layer:
        try:
            if isinstance(model.get_submodule(layer), _ConvBase):
                return f"{layer}.{last}"
        except AttributeError:
            pass
    if isinstance(model, _ConvBase):
        return name.removeprefix(LORALIB_PREFIX)
    return name


def _lora_biases(model: nn.Module) -> set[str]:
    """The names of the adapted layers' biases. A layer with several names gives several."""
    return {
        f"{name}.bias".lstrip(".")
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LoRALayer) and layer.has_adapter and isinstance(getattr(layer, "bias", None), nn.Parameter)
    }


def _check_bias(bias: str) -> None:
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, not {bias!r}")
