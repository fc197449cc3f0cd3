"""A model spread over the processes of a run: each keeps a part of every decoder layer's frozen weights (FSDP2).

`fully_shard` gathers a layer's weights when the layer is called, forwards and backwards, and drops them after it. What
a layer computes with is whole then, so the fast engine finds what it finds in one process. What is trained stays whole
in each process: an adapter is small, and its gradients are averaged as without FSDP. So are the embeddings and the
head, of which the engine reads the weight without calling the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_sharded(model: Any) -> bool:
    """Whether a model's layers are spread over processes, so that all have to compute at the same time."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, nn.Module) and any(isinstance(module, FSDPModule) for module in model.modules())


def shard_layers(model: Any, device: torch.device) -> None:
    """Spread the frozen weights of each decoder layer over all processes. Every process calls it.

    Args:
        model: a PEFT model, or its base, whole in each process.
        device: this process's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in core.model.layers:
        _make_plain(layer)
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def _make_plain(layer: nn.Module) -> None:
    """Hold packed 4-bit weights as parameters of torch's own class, which can be cut; the scales stay at the module."""
    for module in layer.modules():
        weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
        if type(weight).__name__ == "Params4bit":
            module.quant_state = weight.quant_state
            packed = weight.detach().as_subclass(torch.Tensor).clone()
            module.weight = nn.Parameter(packed, requires_grad=False)
