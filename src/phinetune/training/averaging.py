"""DDP for what is trained. The frozen base is the same in all processes, so none of it goes over the network."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def averaged(model: nn.Module, accelerator: Any) -> DistributedDataParallel:
    """The model in DDP, with Accelerate's autocast and its settings of DDP.

    Accelerate's own DDP would send the whole base from the first process to all others before the first step, and it
    refuses a base that is spread over the processes.

    Args:
        model: alike in all processes, but for what is trained, which the first process's becomes.
        accelerator: transformers' `Accelerator`.
    """
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    device, handler = accelerator.device, accelerator.ddp_handler
    own = None if device.type == "cpu" else [device.index]
    wrapped = DistributedDataParallel(model, device_ids=own, **(handler.to_kwargs() if handler else {}))
    if handler:
        handler.register_comm_hook(wrapped)
    return wrapped
