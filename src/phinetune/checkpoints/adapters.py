"""Which layers get a LoRA adapter, and how a saved adapter is loaded onto its base."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_fit
from phinetune.checkpoints.adapter_values import wrong_values
from phinetune.checkpoints.device import pick_device
from phinetune.checkpoints.load import Base, Loaded, find_base, read_shape
from phinetune.checkpoints.quantize import why_no_dora
from phinetune.checkpoints.small_files import read_json
from phinetune.checkpoints.weight_files import read_header
from phinetune.checkpoints.whole import check_numbers
from phinetune.config.model import ModelSection
from phinetune.engine.choice import has_packed_form
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.peft_variants import why_not_begun_again
from phinetune.errors import ModelError, at_most, told_as

BASE_FILE = "base.json"
HISTORY = ("started_from", "combined_from")  # keys of base.json that tell how the adapter came to be


def read_base(folder: Path) -> Base | None:
    """The base that is recorded beside an adapter. None for an adapter that another tool wrote.

    Raises:
        ModelError: the record can't be read.
    """
    file = folder / BASE_FILE
    if not file.exists():
        return None
    tree = {key: value for key, value in read_json(file).items() if key not in HISTORY}
    with told_as(ModelError, f"{file}: broken"):
        base = Base(**tree)
    texts = isinstance(base.path, str) and isinstance(base.fingerprint, str)
    if not texts or not isinstance(base.revision, str | None) or not isinstance(base.seed, int | None):
        raise ModelError(f"{file}: broken: path, revision and fingerprint are texts, seed is a number")
    return base


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


def usable_adapter(folder: Path, section: ModelSection) -> LoraConfig:
    """The configuration of the adapter in `folder`, which can be used on the base that `section` names.

    No weights of the base are loaded.

    Raises:
        ModelError: the folder holds no adapter, the adapter belongs to another base, its tensors don't fit this
            base, or they hold values that are not finite; the error names all of them.
    """
    config = read_adapter_config(folder)
    check_base(find_base(section), folder)
    lost = why_not_begun_again(config.init_lora_weights)
    if lost:
        raise ModelError(f"{folder}: {lost}")
    no_dora = why_no_dora(section.quantization, pick_device(section.device))
    if config.use_dora and no_dora:
        raise ModelError(f"{folder}: use_dora: {no_dora}")
    check_fit(read_shape(section), config, folder)
    check_numbers(load_file(folder / ADAPTER_WEIGHTS).items(), str(folder / ADAPTER_WEIGHTS))
    return config


def attach_adapter(loaded: Loaded, folder: Path, config: LoraConfig) -> PeftModel:
    """Load the adapter in `folder` onto its base. The model is in evaluation mode.

    Args:
        config: what `usable_adapter` returned for the folder and this base.
    """
    if has_packed_form(loaded.model):
        use_fused_layers(config, loaded.model)
    with told_as(ModelError, f"{folder / ADAPTER_CONFIG}: does not fit this base"):
        model = PeftModel(loaded.model, config)
    model.load_adapter(str(folder), "default", is_trainable=False)
    return model.eval()


def read_adapter_config(folder: Path) -> LoraConfig:
    """The `LoraConfig` of an adapter folder.

    Raises:
        ModelError: the folder holds no adapter, a damaged one, or one that is not LoRA.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: no adapter there (expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}{_pickled(folder)})"
        )
    problems = wrong_values(read_json(folder / ADAPTER_CONFIG))
    if problems:
        raise ModelError([f"{folder / ADAPTER_CONFIG}: {problem}" for problem in at_most(problems, 8)])
    read_header(folder / ADAPTER_WEIGHTS)
    with told_as(ModelError, f"{folder / ADAPTER_CONFIG}: not a LoRA configuration"):
        config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder / ADAPTER_CONFIG}: a {config.peft_type} adapter; only LoRA is supported")
    config.inference_mode = True
    return config


def _pickled(folder: Path) -> str:
    """The rest of the sentence where an older PEFT left pickled weights."""
    if not (folder / "adapter_model.bin").is_file():
        return ""
    return "; there is adapter_model.bin, which is pickled: load it with PEFT and save it with save_pretrained"


def _describe(base: Base) -> str:
    revision = f" at {base.revision[:12]}" if base.revision else ""
    return f"{base.path}{revision} (fingerprint {base.fingerprint[:12]})"
