"""What an adapter does to each weight of its base, computed as PEFT would.

PEFT's model is built without memory, on torch's `meta` device. It tells which layers `target_modules` names, which
scale each has (rsLoRA, rank and alpha patterns), which modules are replaced whole, and which tensors the adapter's file
must hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Embedding, LoraLayer
from torch import Tensor

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, check_tensors, with_shapes_of
from phinetune.checkpoints.weight_files import HeldTensor, read_header, read_tensors
from phinetune.engine.families import ModelConfig, plain_model
from phinetune.engine.peft_variants import not_merged, why_not_the_whole_update
from phinetune.errors import ModelError, at_most

COPY = ".base_layer.weight"  # how the name of a copy of the base's weight ends
BLOCK = 1 << 20  # elements that are merged at a time


@dataclass(frozen=True)
class WeightDelta:
    """What an adapter does to one weight. The weight's shape is (out, in); an embedding's is (tokens, width).

    Attributes:
        replacement: a weight that takes the place of the base's: a module of `modules_to_save`, or the copy of an
            embedding that PEFT saves.
        a, b: LoRA's matrices, (r, in) and (out, r); an embedding's are (r, tokens) and (width, r).
        scale: s in s · B A.
        magnitude: DoRA's vector, or None.
    """

    replacement: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    embedding: bool = False
    magnitude: Tensor | None = None

    def apply_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged weight. Product and sum are computed in float32, whatever the dtypes are, then cast once."""
        start = weight if self.replacement is None else self.replacement
        if self.a is None or self.b is None:
            return start.to(dtype)
        left, right = (self.a.T, self.b.T) if self.embedding else (self.b, self.a)
        left, right = left.float(), right.float()
        merged = torch.empty(start.shape, dtype=dtype)
        # One block of rows at a time, so that the float32 numbers stay in the processor's cache. DoRA on an embedding
        # takes the norms of columns, so it needs all rows at once.
        at_once = self.embedding and self.magnitude is not None
        step = len(start) if at_once else max(1, BLOCK // start.shape[1])
        for first in range(0, len(start), step):
            rows = slice(first, first + step)
            merged[rows] = self._normed((left[rows] @ right).mul_(self.scale).add_(start[rows].float()), rows)
        return merged

    def _normed(self, block: Tensor, rows: slice) -> Tensor:
        """With DoRA, scale the weights of each output to the length in `magnitude`; otherwise change nothing."""
        if self.magnitude is None:
            return block
        if self.embedding:
            return block.mul_(self.magnitude.float() / torch.linalg.norm(block, dim=0))
        return block.mul_((self.magnitude[rows].float() / torch.linalg.norm(block, dim=1))[:, None])


Shapes = dict[str, tuple[int, ...]]


def read_weight_deltas(config: ModelConfig, adapter: LoraConfig, folder: Path) -> tuple[Shapes, dict[str, WeightDelta]]:
    """The shapes of all the model's tensors, and the deltas of the weights that the adapter changes; both by name.

    Args:
        config: the base's configuration.
        adapter: PEFT's configuration of the adapter.
        folder: the adapter's folder.

    Raises:
        ModelError: the adapter can't be merged, does not fit this model, or its file is damaged.
    """
    _check_variants(adapter, folder)
    with torch.device("meta"):
        model = plain_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tuned = with_shapes_of(model, adapter, folder)
    header = read_header(folder / ADAPTER_WEIGHTS)
    check_tensors(tuned, {name: held for name, held in header.items() if not name.endswith(COPY)}, folder)
    _check_copies(header, shapes, folder)
    found = read_tensors(folder / ADAPTER_WEIGHTS)
    copies = {name: found.pop(name) for name in list(found) if name.endswith(COPY)}
    deltas = dict(_lora_deltas(tuned, found, copies))
    for name, tensor in found.items():  # what is left are modules_to_save
        deltas[name.removeprefix(PREFIX)] = WeightDelta(replacement=tensor)
    return shapes, deltas


def _check_variants(adapter: LoraConfig, folder: Path) -> None:
    file = folder / ADAPTER_CONFIG
    problems = [f"{file}: `{key}` is set: {why}" for key, why in not_merged(vars(adapter)).items()]
    not_whole = why_not_the_whole_update(adapter.init_lora_weights)
    if not_whole:
        problems.append(f"{file}: {not_whole}")
    if problems:
        raise ModelError(problems)


def _check_copies(header: Mapping[str, HeldTensor], shapes: Shapes, folder: Path) -> None:
    """Make sure that copies of the base's weights have the shapes of the base's weights."""
    copies = {
        f"{name.removeprefix(PREFIX).removesuffix(COPY)}.weight": held
        for name, held in header.items()
        if name.endswith(COPY)
    }
    problems = [
        f"{folder / ADAPTER_WEIGHTS}: a copy of {name} has the shape {held.shape}, and the base has {shapes.get(name)}"
        for name, held in copies.items()
        if held.shape != shapes.get(name)
    ]
    if problems:
        raise ModelError(at_most(problems, 8))


def _lora_deltas(
    model: PeftModel, found: dict[str, Tensor], copies: Mapping[str, Tensor]
) -> Iterator[tuple[str, WeightDelta]]:
    """(the weight's name, its delta) of every layer with LoRA. Removes the layer's tensors from `found`."""
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        embedding = isinstance(layer, Embedding)
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        yield (
            f"{name}.weight",
            WeightDelta(
                replacement=copies.get(f"{PREFIX}{name}.base_layer.weight"),
                a=found.pop(f"{PREFIX}{name}.{a}"),
                b=found.pop(f"{PREFIX}{name}.{b}"),
                scale=float(layer.scaling["default"]),
                embedding=embedding,
                magnitude=found.pop(f"{PREFIX}{name}.lora_magnitude_vector", None),
            ),
        )
