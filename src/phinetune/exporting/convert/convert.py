"""Converting an adapter to another form. Afterwards the update of every layer is checked in the written file.

    phinetune convert runs/demo lora.pt --to loralib
    phinetune convert lora.pt adapter --to peft --lora-alpha 16
    phinetune convert mlx/adapters adapter --to peft --base microsoft/Phi-3.5-mini-instruct
    phinetune convert runs/demo for-vllm --to peft-split
    phinetune convert for-vllm back --to peft-fused

For a linear layer, A and B are the same numbers in PEFT's form and in loralib's. Two things differ: the scale, which
loralib's file does not hold, and fused layers (q, k and v in one). `to_peft` and `to_loralib` convert these. `split`
converts PEFT's adapters of fused layers to those of split layers, and back.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG
from phinetune.checkpoints.adapters import BASE_FILE
from phinetune.checkpoints.foreign_adapters import is_mlx
from phinetune.checkpoints.target_modules import FUSED
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError, at_most
from phinetune.exporting.convert.adapter_files import read_loralib, read_peft, write_loralib, write_peft
from phinetune.exporting.convert.layers import Adapter, ConvertedLayer, Splits, last_part
from phinetune.exporting.convert.split import base_config, known_splits, target_names, to_fused, to_split
from phinetune.exporting.convert.to_loralib import constructors, to_loralib
from phinetune.exporting.convert.to_peft import to_peft
from phinetune.files import publish_files, staged_folder

FORMS = ("peft", "loralib", "peft-split", "peft-fused")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank takes
RTOL = 1e-5  # how much an update may differ, as a part of the layer's largest entry


@dataclass(frozen=True)
class Conversion:
    """A finished and checked conversion.

    Attributes:
        dst: the file or folder that was written.
        kinds: the number of converted layers by kind.
        difference: the largest difference between an update before and after, as a part of the layer's largest entry.
        next_steps: lines that say how to use the converted adapter.
    """

    dst: Path
    kinds: dict[str, int]
    difference: float
    next_steps: list[str]

    def report(self) -> list[str]:
        """What to tell the user."""
        return [
            f"Converted {', '.join(f'{count} {kind}' for kind, count in self.kinds.items())}",
            f"Checked on what was written: the update of each layer is the source's (largest difference "
            f"{self.difference:.1e} of a layer's largest entry)",
            f"Wrote {self.dst}",
            *self.next_steps,
        ]


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    lora_alpha: float | None = None,
    base: str | None = None,
    merged: Sequence[str] = (),
    embedding: Sequence[str] = (),
    linear: Sequence[str] = (),
) -> Conversion:
    """Convert `src` to `dst`. The result is checked before it appears at `dst`.

    Args:
        src: a PEFT adapter folder, one of mlx-lm, or a file that `torch.save(lora.lora_state_dict(model), …)` wrote.
        dst: a file for loralib, a folder for PEFT. It must not exist yet, or be an empty folder.
        to: `peft` or `loralib`; from one PEFT form to another, `peft-split` or `peft-fused`.
        lora_alpha: from loralib, the layers' alpha; to loralib, the alpha for the layers (default: the adapter's).
        base: to PEFT, the base to record.
        merged: fused layers as NAME=ROWS,ROWS,…; NAME is the end of the layers' names, -ROWS a split without an
            adapter. For `peft-split` and `peft-fused` it is needed only if the base's config.json is not available.
        embedding: from loralib, ends of names of embeddings, in addition to `KNOWN_EMBEDDINGS`.
        linear: from loralib, ends of names of linear layers that look like convolutions.

    Raises:
        ModelError: something can't be converted (the error lists all of it), `dst` exists already, or the check found
            a different update.
    """
    src, dst = Path(src), Path(dst)
    problems = _refused_places(src, dst, to)
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        problems.append(f"--lora-alpha must be above 0, not {lora_alpha}")
    from_mlx = src.is_dir() and is_mlx(src)
    if to == "peft" and lora_alpha is None and not from_mlx:
        problems.append("loralib's file does not hold lora_alpha: give the layers' alpha with --lora-alpha")
    problems += _refused_options(to, lora_alpha, base, embedding, linear)
    fused = _parse_merged(merged, problems)
    if problems:
        raise ModelError(problems)
    if to == "peft" and from_mlx:
        return _convert_mlx(src, dst, base)
    if to in ("peft-split", "peft-fused"):
        return _convert_splits(src, dst, to, base, fused)
    if to == "loralib":
        return _convert_to_loralib(src, dst, lora_alpha, fused)
    assert lora_alpha is not None
    layers = to_peft(read_loralib(src), lora_alpha, fused, embedding, linear)
    return _finish_peft(layers, dst, base)


def _convert_mlx(src: Path, dst: Path, base: str | None) -> Conversion:
    config, adapters = read_peft(src)
    layers = {name: ConvertedLayer(one, ((0, one),), last_part(name)) for name, one in adapters.items()}
    return _finish_peft(layers, dst, base or config.base_model_name_or_path)


def _finish_peft(layers: Mapping[str, ConvertedLayer], dst: Path, base: str | None) -> Conversion:
    with staged_folder(dst) as stage:
        write_peft({name: layer.adapter for name, layer in layers.items()}, stage, base)
        difference = _check(layers, read_peft(stage)[1])
    return Conversion(dst, _count(layers), difference, _how_to_load(dst, base))


def _convert_splits(src: Path, dst: Path, to: str, base: str | None, fused: Mapping[str, Splits]) -> Conversion:
    """Convert PEFT's form with fused layers to the form with split layers, or back."""
    config, adapters = read_peft(src)
    shape = base_config(src, config)
    if shape:
        fused = {**_splits_of_base(shape, adapters), **fused}
    layers = to_split(adapters, fused) if to == "peft-split" else to_fused(adapters, fused)
    name = base or config.base_model_name_or_path
    targets = target_names(layers, shape.num_hidden_layers if shape else None)
    converted = {layer: one.adapter for layer, one in layers.items()}
    with staged_folder(dst) as stage:
        write_peft(converted, stage, name, like=config, targets=targets, largest=to == "peft-split")
        if (src / BASE_FILE).is_file() and not base:
            shutil.copyfile(src / BASE_FILE, stage / BASE_FILE)
        difference = _check(layers, read_peft(stage)[1])
    steps = _how_to_serve(dst, name, converted) if to == "peft-split" else _how_to_load(dst, name)
    return Conversion(dst, _count(layers), difference, steps)


def _splits_of_base(shape: ModelConfig, adapters: Mapping[str, Adapter]) -> dict[str, Splits]:
    """The splits of the base's fused layers, as far as there are adapters on the fused or on the split layers."""
    lasts = {last_part(name) for name in adapters}
    needed = {FUSED.get(last, last) for last in lasts}
    return {name: splits for name, splits in known_splits(shape).items() if name in needed}


def _how_to_load(dst: Path, base: str | None) -> list[str]:
    return [
        f"Next (base_model is {base or 'the model whose layers these are'}, loaded without adapters):",
        "  from peft import PeftModel",
        f'  model = PeftModel.from_pretrained(base_model, "{dst}")',
    ]


def _how_to_serve(dst: Path, base: str | None, adapters: Mapping[str, Adapter]) -> list[str]:
    rank = max(adapter.rank for adapter in adapters.values())
    max_rank = next((size for size in VLLM_RANKS if size >= rank), rank)
    return [
        "Next, in vLLM (or with PEFT on a model whose layers are split):",
        f"  vllm serve {base or 'BASE'} --enable-lora --max-lora-rank {max_rank} --lora-modules tuned={dst}",
    ]


def _convert_to_loralib(src: Path, dst: Path, lora_alpha: float | None, fused: Mapping[str, Splits]) -> Conversion:
    config, adapters = read_peft(src)
    alpha = lora_alpha or config.lora_alpha
    layers = to_loralib(adapters, alpha, fused)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.partial-") as stage:
        file = Path(stage) / dst.name
        write_loralib({name: layer.adapter for name, layer in layers.items()}, file)
        difference = _check(layers, _as_built(read_loralib(file), layers, alpha))
        publish_files(Path(stage), dst.parent)
    steps = [
        "Next: build the model with these layers (import phinetune.lora as lora, or loralib as lora):",
        *[f"  {line}" for line in constructors(layers, alpha, config.fan_in_fan_out)],
        "and load the file over the base's weights:",
        f'  model.load_state_dict(torch.load("{dst}", weights_only=True), strict=False)',
    ]
    return Conversion(dst, _count(layers), difference, steps)


def _as_built(
    pairs: Mapping[str, tuple[Tensor, Tensor]], layers: Mapping[str, ConvertedLayer], alpha: float
) -> dict[str, Adapter]:
    """The adapters of a loralib file, in layers that are built as the report says."""
    splits = {name: layer.adapter.splits for name, layer in layers.items()}
    return {name: Adapter(a, b, alpha / b.shape[1], splits=splits.get(name)) for name, (a, b) in pairs.items()}


def _refused_options(
    to: str, lora_alpha: float | None, base: str | None, embedding: Sequence[str], linear: Sequence[str]
) -> list[str]:
    """A problem for each option that does not go with this direction."""
    between_peft_forms = to in ("peft-split", "peft-fused")
    given = {
        "--lora-alpha": ("peft or loralib", lora_alpha is not None and between_peft_forms),
        "--base": ("peft, peft-split or peft-fused", base and to == "loralib"),
        "--embedding": ("peft", embedding and to != "peft"),
        "--linear": ("peft", linear and to != "peft"),
    }
    return [f"{option} only goes with --to {forms}" for option, (forms, wrong) in given.items() if wrong]


def _refused_places(src: Path, dst: Path, to: str) -> list[str]:
    if to not in FORMS:
        return [f"--to must be one of {', '.join(FORMS)}, not {to}"]
    problems = []
    if not src.exists():
        problems.append(f"{src}: no such file or folder")
    elif to == "peft" and src.is_dir() and not is_mlx(src):
        problems.append(f"{src}: a folder; --to peft takes a loralib checkpoint (a .pt file), or a folder of mlx-lm")
    elif to != "peft" and not src.is_dir():
        problems.append(f"{src}: a file; --to {to} takes a PEFT adapter folder (with {ADAPTER_CONFIG})")
    empty = to != "loralib" and dst.is_dir() and not dst.is_symlink() and not any(dst.iterdir())
    if os.path.lexists(dst) and not empty:
        problems.append(f"{dst}: is there already; nothing is overwritten, so name another place")
    return problems


def _parse_merged(merged: Sequence[str], problems: list[str]) -> dict[str, Splits]:
    """The splits by name, from texts of the form `NAME=ROWS,-ROWS,…`. Wrong texts are added to `problems`."""
    fused: dict[str, Splits] = {}
    for text in merged:
        match = re.fullmatch(r"([^=]+)=([-−]?\d+(?:,[-−]?\d+)*)", text.replace(" ", ""))
        rows = [row.lstrip("-−") for row in match[2].split(",")] if match else []
        if not match or 0 in map(int, rows):
            problems.append(f"--merged {text}: expected NAME=ROWS,ROWS,…, with -ROWS for a split without an adapter")
            continue
        adapted = tuple(row[0] not in "-−" for row in match[2].split(","))
        if not any(adapted):
            problems.append(f"--merged {text}: no split has an adapter")
        fused[match[1]] = Splits(tuple(map(int, rows)), adapted)
    return fused


def _check(layers: Mapping[str, ConvertedLayer], written: Mapping[str, Adapter]) -> float:
    """The largest difference between an update in the source and as written, as a part of the layer's largest entry.

    Raises:
        ModelError: a layer is missing, a layer is not in the source, or an update differs by more than `RTOL`.
    """
    problems = [f"{name}: not converted" for name in layers if name not in written]
    problems += [f"{name}: written, but not in the source" for name in written if name not in layers]
    worst = 0.0
    for name in layers.keys() & written.keys():
        wanted, update = layers[name].wanted(), written[name].update()
        if wanted.shape != update.shape:
            problems.append(f"{name}: its update is {tuple(update.shape)} instead of {tuple(wanted.shape)}")
            continue
        largest = float(torch.linalg.vector_norm(wanted, torch.inf))
        difference = float(torch.linalg.vector_norm(update.sub_(wanted), torch.inf))
        part = difference / largest if largest else (math.inf if difference else 0.0)
        worst = max(worst, part)
        if not part <= RTOL:
            problems.append(f"{name}: its update differs by {part:.1e} of its largest entry")
    if problems:
        raise ModelError(["the conversion failed its check, so nothing was written:", *at_most(problems)])
    return worst


def _count(layers: Mapping[str, ConvertedLayer]) -> dict[str, int]:
    kinds = [layer.kind for layer in layers.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
