"""What an adapter does to each tensor of its base, as PEFT itself would lay it on.

PEFT is asked on a model without memory (torch's `meta` device): which layers `target_modules` means, their scales
(rsLoRA, rank and alpha patterns), which modules are replaced whole, and which tensors the adapter's file must hold.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from phinetune.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FUSED
from phinetune.errors import ModelError, at_most

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PREFIX = "base_model.model."
BLOCK = 1 << 20  # elements merged at a time
# What a merged weight can't hold: it depends on the input, or stands where Phi-3 has no parameter.
NOT_MERGED = {
    "lora_bias": "Phi-3's layers have no bias that could take the adapter's",
    "trainable_token_indices": "single trained tokens are not merged",
    "target_parameters": "adapters on bare parameters are not merged",
    "layer_replication": "layers that stand twice are not merged",
    "alora_invocation_tokens": "it acts only after certain tokens, and a merged weight would act on all",
    "use_qalora": "QA-LoRA is not merged",
    "use_bdlora": "BD-LoRA is not merged",
    "arrow_config": "it chooses among adapters for each token",
    "kasa_config": "KaSA is not merged",
    "monteclora_config": "MonteCLoRA is not merged",
    "velora_config": "VeLoRA is not merged",
    "megatron_config": "Megatron's layers are not merged",
}
# These initialisations change the base's weights as well.
CHANGE_THE_BASE = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")


@dataclass(frozen=True)
class Change:
    """What becomes of one weight (out, in); of an embedding's (tokens, width).

    Attributes:
        whole: a weight that replaces the base's (`modules_to_save`, or the copy that PEFT keeps of an embedding).
        a, b: LoRA's matrices, (r, in) and (out, r); an embedding's are (r, tokens) and (width, r).
        scale: s in s · B A.
        magnitude: DoRA's vector, or None.
    """

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    embedding: bool = False
    magnitude: Tensor | None = None

    def applied(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged weight: product and sum in float32 whatever the dtypes that come in, then cast once."""
        start = weight if self.whole is None else self.whole
        if self.a is None or self.b is None:
            return start.to(dtype)
        left, right = (self.a.T, self.b.T) if self.embedding else (self.b, self.a)
        left, right = left.float(), right.float()
        merged = torch.empty(start.shape, dtype=dtype)
        # Block by block, so that the float32 numbers stay in the processor's cache. DoRA's norms over an embedding's
        # columns need all rows at once.
        whole = self.embedding and self.magnitude is not None
        step = len(start) if whole else max(1, BLOCK // start.shape[1])
        for first in range(0, len(start), step):
            rows = slice(first, first + step)
            merged[rows] = self._normed((left[rows] @ right).mul_(self.scale).add_(start[rows].float()), rows)
        return merged

    def _normed(self, block: Tensor, rows: slice) -> Tensor:
        """DoRA: each output's weights brought to the length that its magnitude says."""
        if self.magnitude is None:
            return block
        if self.embedding:
            return block.mul_(self.magnitude.float() / torch.linalg.norm(block, dim=0))
        return block.mul_((self.magnitude[rows].float() / torch.linalg.norm(block, dim=1))[:, None])


Shapes = dict[str, tuple[int, ...]]


def read_changes(config: Phi3Config, adapter: LoraConfig, folder: Path) -> tuple[Shapes, dict[str, Change]]:
    """The shapes of all the model's tensors by name, and what becomes of the changed ones.

    Raises:
        ModelError: an adapter that can't be merged, that does not fit this model, or whose file is damaged.
    """
    _check_kind(adapter, folder)
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tuned = _with_adapter(model, adapter, folder)
    wanted = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(tuned, save_embedding_layers=False).items()}
    found = _read_tensors(folder)
    copies = {name: found.pop(name) for name in list(found) if name.endswith(".base_layer.weight")}
    _check_fit(wanted, found, folder)
    changes = dict(_lora_changes(tuned, found, copies))
    for name, tensor in found.items():  # what is left are modules_to_save
        changes[name.removeprefix(PREFIX)] = Change(whole=tensor)
    return shapes, changes


def _check_kind(adapter: LoraConfig, folder: Path) -> None:
    file = folder / ADAPTER_CONFIG
    problems = [f"{file}: `{key}` is set: {why}" for key, why in NOT_MERGED.items() if getattr(adapter, key, None)]
    start = adapter.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        problems.append(
            f"{file}: `init_lora_weights` is {start!r}, which changed the base's weights, so A and B alone are not "
            "the whole update; save it with PEFT's `path_initial_model_for_weight_conversion` first"
        )
    if problems:
        raise ModelError(problems)


def _with_adapter(model: Phi3ForCausalLM, adapter: LoraConfig, folder: Path) -> PeftModel:
    """PEFT's model on the `meta` device: all its layers and none of their numbers."""
    config = copy.deepcopy(adapter)
    config.init_lora_weights = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings, which are looked after here
            return PeftModel(model, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError) as error:
        hint = ""
        if set(adapter.target_modules or ()) & set(FUSED):
            hint = "; it names split layers, which Phi-3 has fused: `phinetune convert … --to peft-fused` joins them"
        raise ModelError(f"{folder / ADAPTER_CONFIG}: does not fit this base: {error}{hint}") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS}: damaged: {error}") from None


def _check_fit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], folder: Path) -> None:
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in wanted]
    problems += [
        f"{name}: adapter shape {tuple(found[name].shape)} does not match the model's {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        raise ModelError([f"{folder}: the adapter does not fit this base:", *at_most(problems, 8)])


def _lora_changes(
    model: PeftModel, found: dict[str, Tensor], copies: Mapping[str, Tensor]
) -> Iterator[tuple[str, Change]]:
    """(weight's name, change) for every layer with LoRA; its tensors are taken out of `found`."""
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        embedding = isinstance(layer, Embedding)
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        yield (
            f"{name}.weight",
            Change(
                whole=copies.get(f"{PREFIX}{name}.base_layer.weight"),
                a=found.pop(f"{PREFIX}{name}.{a}"),
                b=found.pop(f"{PREFIX}{name}.{b}"),
                scale=float(layer.scaling["default"]),
                embedding=embedding,
                magnitude=found.pop(f"{PREFIX}{name}.lora_magnitude_vector", None),
            ),
        )
