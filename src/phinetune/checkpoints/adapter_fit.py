"""Makes sure that an adapter fits its base before memory is taken for it: PEFT's model is built without numbers.

On torch's `meta` device a model has all its layers and shapes. PEFT says on it which tensors the adapter's file must
hold, so a rank that the file does not have takes no memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from transformers import PreTrainedModel

from phinetune.checkpoints.patterns import why_no_end
from phinetune.checkpoints.target_modules import FUSED, PARTS
from phinetune.checkpoints.weight_files import HeldTensor, read_header, unreadable_dtypes
from phinetune.checkpoints.whole import meta_model
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError, at_most, told_as

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def check_fit(shape: ModelConfig, adapter: LoraConfig, folder: Path) -> None:
    """Make sure that the adapter in `folder` fits a base. No numbers are read.

    Args:
        shape: the base's configuration.
        adapter: PEFT's configuration of the adapter.

    Raises:
        ModelError: it does not fit; the error says why, or names the tensors.
    """
    model = meta_model(f"the base of {folder}", shape)
    check_tensors(with_shapes_of(model, adapter, folder), read_header(folder / ADAPTER_WEIGHTS), folder)


def with_shapes_of(model: PreTrainedModel, adapter: LoraConfig, folder: Path) -> PeftModel:
    """PEFT's model on the `meta` device: it has all the layers of the adapter and no numbers.

    Args:
        model: the base on the `meta` device.
        folder: the adapter's folder.

    Raises:
        ModelError: the configuration does not fit this base, or holds regular expressions without an end.
    """
    file = folder / ADAPTER_CONFIG
    problems = why_no_end(vars(adapter), [name for name, _ in model.named_modules()])
    problems += _beyond(vars(adapter), int(model.config.num_hidden_layers), int(model.config.vocab_size))
    if problems:
        raise ModelError([f"{file}: {problem}" for problem in at_most(problems, 8)])
    config = copy.deepcopy(adapter)
    config.init_lora_weights = True
    where = f"{file}: does not fit this base{_split_hint(adapter.target_modules)}"
    with told_as(ModelError, where), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of tied embeddings: whoever merges them looks at them
        return PeftModel(model, config, low_cpu_mem_usage=True)


def _beyond(peft: Mapping[str, Any], layers: int, tokens: int) -> list[str]:
    """A problem for each key that names a layer or a token which the base does not have."""
    ids = peft.get("trainable_token_indices") or []
    ids = [token for part in ids.values() for token in part] if isinstance(ids, Mapping) else ids
    most = {
        "layer_replication": (
            max((end for _, end in peft.get("layer_replication") or []), default=0),
            layers,
            "layers",
        ),
        "trainable_token_indices": (max(ids, default=-1) + 1, tokens, "tokens"),
    }
    return [
        f"`{key}` needs {needed} {what}, and the base has {there}"
        for key, (needed, there, what) in most.items()
        if needed > there
    ]


def check_tensors(model: PeftModel, found: Mapping[str, HeldTensor], folder: Path) -> None:
    """Make sure that an adapter's file holds the tensors of PEFT's model, and no others.

    Args:
        model: what `with_shapes_of` returned.
        found: the header of the adapter's file.
        folder: the adapter's folder.

    Raises:
        ModelError: it does not; the error names the tensors.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    problems += [
        f"{name}: adapter shape {found[name].shape} does not match the model's {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems += unreadable_dtypes(found)
    if problems:
        hints = _forms(found, expected)
        raise ModelError([f"{folder}: the adapter does not fit this base:", *hints, *at_most(problems, 8)])


def _forms(saved: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Which other form of an adapter the names that don't fit belong to, in a sentence each."""
    strange = [name for name in saved if name not in expected]
    hints = [hint for hint in [_split_hint(part for name in strange for part in name.split("."))] if hint]
    if any(".default." in name for name in strange):
        hints.append("the names hold the adapter's own name `default`: save the adapter with PEFT's save_pretrained")
    if any(".base_layer." in name for name in strange):
        hints.append("it holds weights of the base, too (base_layer); save it with save_embedding_layers=False")
    if any(PREFIX + name in expected for name in strange):
        hints.append(f"the names lack `{PREFIX}`, which PEFT's save_pretrained writes")
    return hints


def _split_hint(names: object) -> str:
    """What to do where layers of the base's other form are named; empty if none is."""
    if not isinstance(names, Iterable) or isinstance(names, str):
        return ""
    named = set(names)
    if named & FUSED.keys():
        return " (it names split layers, which Phi-3 has fused: `phinetune convert … --to peft-fused` joins them)"
    if named & PARTS.keys():
        return " (it names fused layers, which this base has split: `phinetune convert … --to peft-split` divides them)"
    return ""
