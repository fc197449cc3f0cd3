"""LoRA layers with loralib's API: `import phinetune.lora as lora`.

    layer = lora.Linear(in_features, out_features, r=16)
    lora.mark_only_lora_as_trainable(model)
    torch.save(lora.lora_state_dict(model), path)
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)

This package imports only torch and `phinetune.engine.kernels.matmul`, which imports only torch.
"""

from phinetune.lora.base import LoRALayer
from phinetune.lora.conv import Conv1d, Conv2d, Conv3d
from phinetune.lora.functional import lora_linear
from phinetune.lora.linear import Embedding, Linear, MergedLinear
from phinetune.lora.replace import apply, unload
from phinetune.lora.state_dict import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "apply",
    "load_lora_state_dict",
    "lora_linear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "unload",
]
