"""Checkpoints whose layers bitsandbytes has quantised to NF4 already, such as `unsloth/…-bnb-4bit` on the hub.

Which layers these are is seen in the files; all others are in 16 or 32 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from phinetune.checkpoints.packed_weights import PackedWeight, packed_weights
from phinetune.checkpoints.quantize import check_quantization
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.checkpoints.weight_files import HeldTensor, held_tensors
from phinetune.config.model import ModelSection
from phinetune.engine.families import ModelConfig, plain_model
from phinetune.errors import ModelError, at_most


def own_form(config: ModelConfig, where: str) -> str:
    """How the weights of a checkpoint are quantised already: `nf4`, or `none`.

    Args:
        config: as its config.json says.
        where: what the error calls config.json.

    Raises:
        ModelError: they are quantised in a form that is not read.
    """
    tree = _tree(config)
    unlike = _unlike_nf4(tree) if tree else ""
    if not unlike:
        return "nf4" if tree else "none"
    raise ModelError(
        f"{where}: the weights are quantised already (quantization_config: {unlike}), and of such forms only "
        "bitsandbytes' nf4 is read; give the 16-bit checkpoint, and model.quantization: nf4 or int8 to hold it in "
        "fewer bits"
    )


def _unlike_nf4(tree: Mapping[str, Any]) -> str:
    """What of a checkpoint's `quantization_config` is not NF4 as it is read here; empty if all is."""
    method = tree.get("quant_method", "bitsandbytes" if tree.get("load_in_4bit") else "of an unknown kind")
    if method != "bitsandbytes":
        return str(method)
    if not tree.get("load_in_4bit"):
        return "bitsandbytes, load_in_8bit" if tree.get("load_in_8bit") else "bitsandbytes, without load_in_4bit"
    for key, otherwise, read in (("quant_type", "fp4", "nf4"), ("quant_storage", "uint8", "uint8")):
        value = tree.get(f"bnb_4bit_{key}") or otherwise
        if value != read:
            return f"bitsandbytes, bnb_4bit_{key}: {value}"
    return ""


def held_as(section: ModelSection, config: ModelConfig) -> str:
    """How the model that `section` names holds its linear layers: `none`, `nf4` or `int8`.

    That is `model.quantization`, or the form in which the checkpoint has them already.

    Args:
        config: of the checkpoint.

    Raises:
        ModelError: the checkpoint is quantised in a form that is not read, or in another than `section` asks for; or
            bitsandbytes is not installed.
    """
    own = own_form(config, f"{section.path}: config.json")
    if own == "none":
        check_quantization(section.quantization)
        return section.quantization
    if section.quantization not in ("none", own):
        raise ModelError(
            f"model.quantization: {section.quantization}: the weights of {section.path} are in {own} already; leave "
            "the key out, or give the 16-bit checkpoint"
        )
    check_readable(section.path)
    return own


def check_readable(where: str) -> None:
    """Make sure that weights in NF4 can be read.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{where}: its weights are in nf4, and that needs bitsandbytes; pip install 'phinetune[quant]'"
        )


def is_held_so(name: str, config: ModelConfig) -> bool:
    """Whether a linear layer of a quantised model holds few bits, by its name and the checkpoint's config.json.

    `llm_int8_skip_modules` names what stays in 16 bits: whole modules, or the ends of names.
    """
    kept = map(str, _tree(config).get("llm_int8_skip_modules") or [])
    return not any(name.startswith(f"{one}.") or name.endswith(one) for one in kept)


def is_double(config: ModelConfig) -> bool:
    """Whether the scales of NF4 are quantised, too. `model.quantization: nf4` always does that."""
    tree = _tree(config)
    return bool(tree.get("bnb_4bit_use_double_quant")) if tree else True


def _tree(config: ModelConfig) -> Mapping[str, Any]:
    """The `quantization_config` of a model's configuration; empty if it has none."""
    given = getattr(config, "quantization_config", None) or {}
    tree: Mapping[str, Any] = given if isinstance(given, dict) else given.to_dict()  # of a model that is loaded
    return tree


def check_packed(
    packed: Mapping[str, PackedWeight], held: Mapping[str, HeldTensor], layers: Collection[str], where: str
) -> None:
    """Make sure that the quantised weights are those of the decoder's linear layers.

    Args:
        packed, held: the quantised weights, and all tensors.
        layers: the names of these layers.
        where: what the error calls the folder.

    Raises:
        ModelError: config.json says that there are quantised weights and there is none, or one is of another module.
    """
    if not packed:
        raise ModelError(
            f"{where}: config.json says that the weights are quantised (quantization_config), and no tensor of the "
            f"{len(held)} is; take the config.json that belongs to them"
        )
    others = [name for name in packed if name.removesuffix(".weight") not in layers]
    if others:
        raise ModelError(
            [f"{where}: only the decoder's linear layers can be quantised; these are, too:", *at_most(others, 8)]
        )


def as_it_is(folder: Path, config: ModelConfig, wanted: Any) -> dict[str, Any]:
    """The `quantization_config` by which transformers reads a checkpoint that is quantised already, as its files are.

    Args:
        wanted: the `BitsAndBytesConfig` of the same kind, with the dtype of the products.
    """
    packed = packed_weights(held_tensors(folder), str(folder))
    with torch.device("meta"):
        layers = linear_layers(plain_model(config))
    tree: dict[str, Any] = wanted.to_dict()
    return {**tree, "llm_int8_skip_modules": ["lm_head", *(name for name in layers if f"{name}.weight" not in packed)]}
