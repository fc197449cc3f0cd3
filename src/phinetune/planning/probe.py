"""How long a step takes on this machine, from a model with two layers of the real shape and a real micro-batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from peft import get_peft_model
from torch import nn
from transformers import Phi3Config

from phinetune.checkpoints import random_shapes as synthetic
from phinetune.checkpoints.adapters import resolve_targets, trainable_parameters
from phinetune.checkpoints.load import load_base
from phinetune.config.run import ModelSection
from phinetune.engine.choice import Engine
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.memory import Level
from phinetune.training.settings import Settings, make_lora_config

ROUNDS = 3
LONG = 5.0  # seconds: a round that takes longer is not repeated


@dataclass(frozen=True)
class Speed:
    """Seconds, measured.

    Attributes:
        tokens: of the micro-batch that was measured.
        layer: a layer's forward and backward, by what it keeps.
        rest: everything but the layers: embedding, head, loss.
        a_parameter: the optimizer's work for one.
    """

    tokens: int
    layer: dict[Level, float]
    rest: float
    a_parameter: float

    def batch(self, levels: Sequence[Level], tokens: float) -> float:
        """Seconds of a micro-batch of so many tokens."""
        return (self.rest + sum(self.layer[level] for level in levels)) * tokens / self.tokens


def measure(
    section: ModelSection,
    config: Phi3Config,
    settings: Settings,
    engine: Engine,
    rows: Sequence[dict[str, Any]],
    levels: Sequence[Level],
) -> Speed:
    """Forward and backward of `rows` through one layer and through two; the difference is a layer."""
    loaded = load_base(two_layers(section, config), fast=True)
    lora = make_lora_config(settings, resolve_targets(loaded.model, settings.peft.get("target_modules")))
    lora.layers_to_transform, lora.init_lora_weights = None, True
    model: Any = get_peft_model(loaded.model, use_fused_layers(lora, loaded.model)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    batch = {key: value.to(loaded.device) for key, value in engine.collator(loaded.model)(rows).items()}
    engine.set_up(model, loaded.device)
    decoder = model.get_base_model().model
    both = decoder.layers

    def step(kept: Sequence[Level]) -> float:
        decoder.layers = both[: len(kept)]
        decoder.activation_levels = lambda tokens: kept
        return _seconds(lambda: _step(model, batch, loaded.device))

    one = step([Level.KEEP])
    layer = {level: step([level, Level.KEEP]) - one for level in sorted({Level.KEEP, *levels})}
    decoder.layers = both
    rest = max(0.0, one - layer[Level.KEEP])
    return Speed(int(batch["row_tokens"]), layer, rest, _optimizer(trained) / trainable_parameters(model)[0])


def two_layers(section: ModelSection, config: Phi3Config) -> ModelSection:
    """A model of this shape with two layers and random weights, held as the section says."""
    sizes = {key: value for key, value in config.to_diff_dict().items() if key in Phi3Config().to_dict()}
    drop = ("architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "auto_map")
    shape = {key: value for key, value in sizes.items() if key not in drop} | {"num_hidden_layers": 2}
    text = yaml.safe_dump(shape, default_flow_style=True, width=1 << 30).strip()
    return section.model_copy(update={"path": synthetic.PREFIX + text, "revision": None, "tokenizer": None})


def _step(model: nn.Module, batch: dict[str, Any], device: torch.device) -> None:
    out = model(**batch)
    (out.nll / out.count).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _optimizer(trained: Sequence[nn.Parameter]) -> float:
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    return _seconds(lambda: (nn.utils.clip_grad_norm_(trained, 1.0), optimizer.step()))


def _seconds(work: Callable[[], Any]) -> float:
    """The median of a few rounds after a first."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if times[-1] > LONG:
            return times[-1]
    return statistics.median(times[1:])
