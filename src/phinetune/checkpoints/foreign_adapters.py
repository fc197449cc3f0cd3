"""Adapters as other tools leave them, for whoever opens one: PEFT's folder as it is, mlx-lm's in PEFT's form.

TRL, Unsloth, LLaMA-Factory and axolotl write PEFT's folders, in `checkpoint-500` and so on too. mlx-lm has a form of
its own: `adapters.safetensors` with lora_a (in, r) and lora_b (r, out) of each layer, and y = W x + scale · (x a) b.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from phinetune.checkpoints.small_files import read_json
from phinetune.checkpoints.weight_files import read_tensors
from phinetune.errors import ModelError, at_most
from phinetune.files import file_digest, staged_folder
from phinetune.home import cache_folder

logger = logging.getLogger(__name__)

MLX_WEIGHTS = "adapters.safetensors"
MLX_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[ab])")
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
# How checkpoints are named that hold their weights in bitsandbytes' nf4, and not in 16 bits.
IN_NF4 = re.compile(r"(?P<base>.+?)-bnb-4bit", re.IGNORECASE)


def peft_folder(path: str | Path) -> Path:
    """The folder in PEFT's form of the adapter at `path`. Any other path is returned as it is.

    An adapter of mlx-lm is written in PEFT's form into the user's cache, once.

    Raises:
        ModelError: there is an adapter that can't be opened like this; the error says what to do.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix in TORCH_FILES:
        raise ModelError(
            f"{path}: a file of torch.save, as loralib's adapters are; it does not say which base and which alpha it "
            f"belongs to: phinetune convert {path} {folder.with_suffix('')}-peft --to peft --lora-alpha ALPHA --base "
            "BASE"
        )
    if not folder.is_dir():
        return folder
    if not (folder / ADAPTER_CONFIG).is_file():
        _name_its_checkpoints(folder)
        return folder
    return _from_mlx(folder) if is_mlx(folder) else folder


def _name_its_checkpoints(folder: Path) -> None:
    """Refuse a trainer's folder that holds adapters in its checkpoints alone."""
    found = [place for place in folder.glob("checkpoint-*") if (place / ADAPTER_CONFIG).is_file()]
    if found and not (folder / "config.json").is_file():
        last = max(found, key=lambda place: (len(place.name), place.name))
        raise ModelError(
            f"{folder}: no adapter there, but in {len(found)} of its checkpoints; give one, such as {last}"
        )


def is_mlx(folder: Path) -> bool:
    """Whether a folder holds an adapter of mlx-lm."""
    there = (folder / MLX_WEIGHTS).is_file() and (folder / ADAPTER_CONFIG).is_file()
    return there and "lora_parameters" in read_json(folder / ADAPTER_CONFIG)


def _from_mlx(folder: Path) -> Path:
    digest = file_digest(folder / MLX_WEIGHTS)[:16] + file_digest(folder / ADAPTER_CONFIG)[:16]
    made = cache_folder() / "adapters" / digest
    if not (made / ADAPTER_WEIGHTS).is_file():
        with staged_folder(made) as stage:
            write_from_mlx(folder, stage)
    logger.info("%s: an adapter of mlx-lm, read in PEFT's form from %s", folder, made)
    return made


def write_from_mlx(folder: Path, target: Path, base: str | None = None) -> None:
    """Write an adapter of mlx-lm in PEFT's form.

    Args:
        folder: mlx-lm's.
        target: an empty folder.
        base: the base to record; None is the one that mlx-lm was given.

    Raises:
        ModelError: it is no LoRA adapter, or its files are damaged.
    """
    tree = read_json(folder / ADAPTER_CONFIG)
    scale = _mlx_scale(tree, folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for name, tensor in read_tensors(folder / MLX_WEIGHTS).items():
        match = MLX_NAME.fullmatch(name)
        if match and tensor.dim() == 2:
            parts.setdefault(match["layer"], {})[match["part"]] = tensor.T.contiguous()
        else:
            problems.append(f"{name}: no lora_a or lora_b of a layer, and only these are read")
    problems += [
        f"{layer}: lora_a and lora_b don't fit: {', '.join(str(tuple(one.shape)) for one in pair.values())}"
        for layer, pair in parts.items()
        if len(pair) != 2 or pair["a"].shape[0] != pair["b"].shape[1]
    ]
    if problems or not parts:
        named = at_most(problems, 8) or ["it holds no tensor"]
        raise ModelError([f"{folder / MLX_WEIGHTS}: {problem}" for problem in named])
    rank = next(iter(parts.values()))["a"].shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=_tidy(scale * rank),  # type: ignore[arg-type, unused-ignore]
        target_modules=list(parts),
        base_model_name_or_path=base or tree.get("model"),
        task_type="CAUSAL_LM",  # type: ignore[arg-type, unused-ignore]
        inference_mode=True,
    )
    config.save_pretrained(str(target))
    tensors = {}
    for layer, pair in parts.items():
        for part, tensor in pair.items():
            tensors[f"{PREFIX}{layer}.{_peft_name(layer, part)}"] = tensor
    save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(target / ADAPTER_CONFIG, target / ADAPTER_WEIGHTS)


def _peft_name(layer: str, part: str) -> str:
    return f"lora_embedding_{part.upper()}" if layer.endswith("embed_tokens") else f"lora_{part.upper()}.weight"


def _mlx_scale(tree: Mapping[str, Any], folder: Path) -> float:
    """s in s · B A. In its first releases mlx-lm multiplied its scale by alpha / rank; later it reads no alpha."""
    where = f"{folder / ADAPTER_CONFIG}"
    kind = tree.get("fine_tune_type", "lora")
    if kind != "lora" or tree.get("use_dora"):
        raise ModelError(f"{where}: fine_tune_type is {'dora' if tree.get('use_dora') else kind}; only lora is read")
    given = tree["lora_parameters"]
    numbers = [given.get(key) for key in ("scale", "rank")] if isinstance(given, dict) else [None]
    if not all(isinstance(one, (int, float)) and one > 0 for one in numbers):
        raise ModelError(f"{where}: lora_parameters must have a scale and a rank above 0, as mlx-lm writes them")
    scale, alpha = float(given["scale"]), given.get("alpha")
    if alpha is None:
        return scale
    if "lora_layers" in tree:  # that key's name in the releases that read alpha
        return scale * float(alpha) / float(given["rank"])
    logger.warning("%s: `alpha` has no effect: mlx-lm reads `scale` alone", where)
    return scale


def _tidy(alpha: float) -> float:
    """`alpha` without the rounding error of a product; an int if it is a whole number."""
    rounded = float(f"{alpha:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def sixteen_bit_base(name: str) -> tuple[str, dict[str, str]]:
    """The checkpoint in 16 bits that a base was made of, and the keys of `model` that hold it as the base is.

    Unsloth trains on copies in bitsandbytes' nf4, `…-bnb-4bit`, which were quantised from `…` as `model.quantization:
    nf4` does it. Its copies `…-unsloth-bnb-4bit` leave some layers in 16 bits; they are not the same.
    """
    match = IN_NF4.fullmatch(name)
    if not match or match["base"].endswith("-unsloth") or Path(name).expanduser().exists():
        return name, {}
    return match["base"], {"quantization": "nf4"}
