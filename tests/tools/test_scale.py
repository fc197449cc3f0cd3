"""The formulas of docs/scale.md against the planner, against DDP itself, and against what a process holds."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from doc_pages import scale
from doc_pages.family import FAMILY, need, sizes
from doc_pages.scale_parts import load
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from helpers import TINY
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.random_shapes import parse_shape
from phinetune.config.model import ModelSection
from phinetune.engine.families import plain_model
from phinetune.planning.sizes import count_sizes
from phinetune.training.settings import read_settings

MINI = FAMILY[0]
# Parameters as the checkpoints' cards give them, in thousands of millions.
PUBLISHED = {"Phi-3 mini, Phi-3.5 mini": 3.8, "Phi-4 mini": 3.8, "Phi-3 medium": 14.0, "Phi-4": 14.7}


@pytest.mark.parametrize("model", FAMILY, ids=lambda model: model.name)
def test_shapes_are_those_of_the_checkpoints(model: Any) -> None:
    assert load(model).base_parameters / 1e9 == pytest.approx(PUBLISHED[model.name], abs=0.05)


def test_ddp_sends_the_gradients_of_the_adapter_and_no_more() -> None:
    """The bytes that DDP hands to its communication in one backward of a real adapter."""
    settings = read_settings({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, {})
    counted = count_sizes(parse_shape(TINY), "none", settings, torch.float32)
    base = load_base(ModelSection(path=TINY, device="cpu"), fast=False).model
    sent: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        sent.append(bucket.buffer().nbytes)
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
        model.register_comm_hook(None, hook)
        model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    finally:
        distributed.destroy_process_group()
    of_tiny = scale.Load(counted.weights, 0, 0, counted.trainable, counted.parameters - counted.trainable)
    assert sum(sent) == scale.gradient_bytes(of_tiny)
    assert scale.ddp_traffic(of_tiny, 2) == sum(sent)  # of two, each sends half and passes half on
    assert scale.ddp_traffic(of_tiny, 1) == 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_lies_on_a_device_is_what_a_plan_says(quantization: str) -> None:
    parts, _ = need(MINI, quantization, 256, "all", 0)
    one = load(MINI, quantization)
    assert scale.adapter_memory(one) == parts.adapter + parts.optimizer
    assert scale.ddp_memory(one) == parts.weights + parts.adapter + parts.optimizer + scale.gradient_bytes(one)


def test_a_layers_bytes_are_those_of_the_models_own_layer() -> None:
    config = parse_shape(MINI.path)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        layer = plain_model(config, dtype=torch.bfloat16).model.layers[0]
    assert load(MINI).layer == sum(weight.nbytes for weight in layer.parameters())
    assert (
        scale.fsdp_memory(load(MINI), 1)
        == sizes(MINI).weights + scale.adapter_memory(load(MINI)) + 2 * load(MINI).layer
    )


def test_a_shuffled_order_takes_forty_bytes_a_row() -> None:
    order = torch.randperm(100_000).tolist()
    held = sys.getsizeof(order) + sum(map(sys.getsizeof, order))
    assert 0.85 * scale.INDEX < held / len(order) <= scale.INDEX


def test_times_and_intervals() -> None:
    assert scale.seconds_to_send(125e6, 1e9) == 1.0
    batches = scale.accumulation_for(compute=2.0, send=1.6, wanted=0.9)
    assert scale.efficiency(batches * 2.0, 1.6) >= 0.9 > scale.efficiency((batches - 1) * 2.0, 1.6)
    assert scale.seconds_between_checkpoints(2.0, 10_000.0) == 200.0
