"""Reads an adapter without its base: A and B alone, to answer beside others on a base that is loaded already."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights

from phinetune.checkpoints.adapter_fit import ADAPTER_CONFIG
from phinetune.checkpoints.adapters import check_base, usable_adapter
from phinetune.checkpoints.load import Loaded
from phinetune.config.model import ModelSection
from phinetune.engine.continuous.low_rank import Adapter, on_device, read_updates
from phinetune.engine.families import plain_model
from phinetune.engine.peft_variants import moves_the_base
from phinetune.errors import ModelError, told_as


def read_beside(loaded: Loaded, section: ModelSection, folder: Path) -> Adapter:
    """The updates of the adapter in `folder`, in the dtype and on the device of the base.

    PEFT itself lays them out, on a model without memory, so ranks, scalings and patterns are PEFT's.

    Args:
        loaded: the base.
        section: what it was loaded by.

    Raises:
        ModelError: there is no adapter that fits this base, or it does more than add A and B to linear layers.
    """
    check_base(loaded.base, folder)
    config = usable_adapter(folder, section)
    if moves_the_base(vars(config)):
        raise ModelError(
            f"{folder}: this adapter changes its base's weights, so it can't be answered beside others on one base; "
            "merge it (`phinetune merge`) and serve what comes out"
        )
    with told_as(ModelError, f"{folder / ADAPTER_CONFIG}: does not fit this base"):
        with torch.device("meta"):
            shape = plain_model(loaded.model.config)
        model = PeftModel(shape, config, low_cpu_mem_usage=True)
        weights = load_peft_weights(str(folder), device="cpu")
    return on_device(read_updates(model.eval(), weights), loaded.model.dtype, loaded.device)
