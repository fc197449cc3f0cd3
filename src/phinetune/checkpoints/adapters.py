"""Which layers get a LoRA adapter, and how a saved adapter is loaded onto its base."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from phinetune.checkpoints.load import Base, Loaded
from phinetune.engine.choice import has_packed_form
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.errors import ModelError, at_most

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"


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
