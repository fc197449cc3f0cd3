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
        ValueError: `bias` is none of these, or an `nn.MultiheadAttention` has an adapter that it would never use.
    """
    _check_bias(bias)
    _check_attention(model)
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

    If a tensor does not fit, nothing is loaded. `model.load_state_dict(state, strict=False)`, loralib's way, loads what
    fits and leaves out the rest without a word: with other names, for example, that is everything.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape. The message names them all. Or neither the
            model nor `state` has adapters.
    """
    renamed = {_torch_name(model, name): tensor for name, tensor in state.items()}
    there = model.state_dict()
    wanted = {name for name in there if "lora_" in name}
    if not wanted and not any("lora_" in name for name in renamed):
        raise ValueError(
            "neither the model nor what is to be loaded has adapters: put LoRA layers into the model first"
        )
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


def _check_attention(model: nn.Module) -> None:
    """Refuse an adapter as the out_proj of `nn.MultiheadAttention`, which reads its weight and never calls it.

    In training the adapter would have no effect and get no gradient; in evaluation it would be merged.
    """
    found = [
        f"{name}.out_proj".lstrip(".")
        for name, layer in model.named_modules()
        if isinstance(layer, nn.MultiheadAttention) and getattr(layer.out_proj, "has_adapter", False)
    ]
    if found:
        why = "nn.MultiheadAttention reads this layer's weight and never calls it"
        raise ValueError(
            f"{', '.join(found)}: {why}, so an adapter would have no effect in training: put torch's own layer there"
        )


def _check_bias(bias: str) -> None:
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, not {bias!r}")
