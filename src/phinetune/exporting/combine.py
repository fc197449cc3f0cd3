"""Several adapters of one base made into one adapter, each with a weight, by PEFT's `add_weighted_adapter`.

PEFT needs a model with the adapters on it. Here it is one whose own weights take no memory: all of a weight's numbers
are the same zero.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phinetune.checkpoints.adapters import BASE_FILE, usable_adapter
from phinetune.checkpoints.foreign_adapters import peft_folder
from phinetune.checkpoints.load import Base, find_base, read_shape
from phinetune.checkpoints.opened import is_adapter, recorded_config
from phinetune.checkpoints.whole import meta_model
from phinetune.config.model import ModelSection
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError, at_most, told_as
from phinetune.exporting.convert.adapter_files import read_peft
from phinetune.exporting.convert.layers import Adapter
from phinetune.files import file_digest, staged_folder, write_text
from phinetune.logs import quiet_libraries

EXACT = "cat"  # stacks the adapters, so the result is their weighted sum; its rank is the sum of the ranks
METHODS = (EXACT, "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING = ("ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune")  # those that take a density
RTOL = 1e-5  # how much `cat` may differ from the sum, as a part of a layer's largest entry
MADE = "combined"


@dataclass(frozen=True)
class Part:
    """One of the adapters.

    Attributes:
        place: its folder, in PEFT's form.
        weight: the factor of its update.
        section: the base that it belongs to.
    """

    place: Path
    weight: float
    section: ModelSection


@dataclass(frozen=True)
class Combination:
    """What was written.

    Attributes:
        path: the folder.
        rank: of the new adapter.
        layers: how many layers it has.
        off: how far its updates are from the weighted sum, as a part of a layer's largest entry.
    """

    path: Path
    method: str
    rank: int
    layers: int
    off: float

    def report(self) -> list[str]:
        """What to tell the user."""
        exact = "which is the weighted sum of the updates" if self.off <= RTOL else "no exact sum"
        return [
            f"Combined by {self.method}: {self.layers} layers of rank {self.rank}, {exact} (largest difference "
            f"{self.off:.1e} of a layer's largest entry)",
            f"Wrote {self.path}",
        ]


def parse_parts(texts: Sequence[str]) -> list[tuple[str, float]]:
    """(path, weight) of each text of the form `RUN=WEIGHT`.

    Raises:
        ModelError: a text has another form, or there are fewer than two.
    """
    parts, problems = [], []
    for text in texts:
        path, _, number = text.rpartition("=")
        try:
            weight = float(number) if path else math.nan
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight == 0:
            problems.append(f"{text}: write an adapter and its weight as RUN=WEIGHT, for example runs/a=0.7")
        parts.append((path, weight))
    if len(parts) < 2 and not problems:
        problems.append("give two adapters or more, each as RUN=WEIGHT")
    if problems:
        raise ModelError(problems)
    return parts


def combine(
    parts: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    method: str = EXACT,
    rank: int | None = None,
    density: float | None = None,
) -> Combination:
    """Write one adapter that is made of several of the same base.

    Args:
        parts: runs, checkpoints or adapter folders, each with its weight.
        out: a folder that is not there yet, or empty. It appears whole or not at all.
        method: PEFT's `combination_type`.
        rank: of the result, with svd alone; None is the largest rank of the parts.
        density: the share of the numbers that are kept, with the methods in `PRUNING`.

    Raises:
        ModelError: the adapters belong to different bases or hold more than A and B, or `out` is taken.
    """
    quiet_libraries()
    out = Path(out).expanduser()
    problems = _wrong_options(method, rank, density)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        problems.append(f"{out}: is there already; nothing is overwritten, so name another folder")
    if problems:
        raise ModelError(problems)
    opened = [_opened(path, weight) for path, weight in parts]
    base = _one_base(opened)
    held = [read_peft(part.place) for part in opened]  # refuses what A and B do not hold
    model = _with_adapters(opened, [config for config, _ in held], read_shape(opened[0].section))
    with told_as(ModelError, f"PEFT's add_weighted_adapter ({method})"), torch.no_grad():
        model.add_weighted_adapter(
            [_name(i) for i in range(len(opened))],
            [part.weight for part in opened],
            MADE,
            combination_type=method,
            svd_rank=rank,
            svd_full_matrices=False,
            density=density,
        )
    with staged_folder(out) as stage:
        _save(model, stage, base, opened, method)
        config, made = read_peft(stage)
        off = _off(made, [adapters for _, adapters in held], [part.weight for part in opened])
        if method == EXACT and not off <= RTOL:
            raise ModelError(f"the combined adapter differs by {off:.1e} from the sum, so nothing was written")
    return Combination(out, method, config.r, len(made), off)


def _wrong_options(method: str, rank: int | None, density: float | None) -> list[str]:
    if method not in METHODS:
        return [f"--method must be one of {', '.join(METHODS)}, not {method}"]
    problems = []
    if rank is not None and (not method.endswith("svd") or rank < 1):
        problems.append(f"--rank is a number above 0 for svd and ties_svd; the rank of {method} follows from the parts")
    if (density is not None) != (method in PRUNING) or not 0 < (density or 1) <= 1:
        problems.append(f"--density, above 0 and at most 1, is for {', '.join(PRUNING)}, which need it")
    return problems


def _opened(path: str | Path, weight: float) -> Part:
    place = peft_folder(path)
    if not is_adapter(place):
        raise ModelError(f"{path}: no adapter there ({ADAPTER_CONFIG}); give a run, a checkpoint or an adapter folder")
    section = recorded_config(place).model
    usable_adapter(place, section)
    return Part(place, weight, section)


def _one_base(parts: Sequence[Part]) -> Base:
    """The base of all parts.

    Raises:
        ModelError: they have several.
    """
    bases = [find_base(part.section) for part in parts]
    if len({base.fingerprint for base in bases}) > 1:
        named = [f"{part.place}: its base is {base.path}" for part, base in zip(parts, bases, strict=True)]
        raise ModelError(["the adapters belong to different bases:", *named])
    return bases[0]


def _with_adapters(parts: Sequence[Part], configs: Sequence[LoraConfig], shape: ModelConfig) -> PeftModel:
    """A model whose own weights take no memory, with all adapters."""
    model: Any = meta_model("the base", shape)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    # PEFT takes the new adapter's settings from the first; its scale is in the numbers already.
    first = replace(configs[0], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = PeftModel(model, first, _name(0))
        for i, part in enumerate(parts):
            tuned.load_adapter(str(part.place), _name(i))
    tuned.peft_config[_name(0)] = replace(first, use_rslora=False, lora_dropout=0.0)
    return tuned


def _name(i: int) -> str:
    """PEFT's name for a part. A number alone would be taken for a layer's."""
    return f"part_{i}"


def _save(model: PeftModel, stage: Path, base: Base, parts: Sequence[Part], method: str) -> None:
    config = cast(LoraConfig, model.peft_config[MADE])
    config.base_model_name_or_path, config.revision, config.inference_mode = base.path, base.revision, True
    model.save_pretrained(str(stage), selected_adapters=[MADE], save_embedding_layers=False)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (stage / MADE / name).rename(stage / name)
    shutil.rmtree(stage / MADE)
    for file in stage.iterdir():
        if file.name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            file.unlink()  # PEFT's card, which knows nothing
    shutil.copymode(stage / ADAPTER_CONFIG, stage / ADAPTER_WEIGHTS)
    made_of = [
        {
            "adapter": str(part.place.resolve()),
            "weight": part.weight,
            "sha256": file_digest(part.place / ADAPTER_WEIGHTS),
        }
        for part in parts
    ]
    tree = asdict(base) | {"combined_from": {"method": method, "parts": made_of}}
    write_text(stage / BASE_FILE, json.dumps(tree, indent=2) + "\n")


def _off(made: Mapping[str, Adapter], parts: Sequence[Mapping[str, Adapter]], weights: Sequence[float]) -> float:
    """The largest difference between an update and the weighted sum, as a part of the layer's largest entry.

    Raises:
        ModelError: a layer is missing, or is in none of the parts.
    """
    names = {name for part in parts for name in part}
    if names != made.keys():
        raise ModelError(["PEFT combined other layers than the adapters have:", *at_most(sorted(names ^ made.keys()))])
    worst = 0.0
    for name, adapter in made.items():
        total = torch.zeros((), dtype=torch.float64)
        for part, weight in zip(parts, weights, strict=True):
            total = total + part[name].update() * weight if name in part else total
        worst = max(worst, _part_of(adapter.update() - total, total))
    return worst


def _part_of(difference: Tensor, total: Tensor) -> float:
    largest = float(total.abs().max())
    return float(difference.abs().max()) / largest if largest else float(difference.abs().max() > 0)
