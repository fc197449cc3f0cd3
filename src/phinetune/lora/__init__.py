"""LoRA layers with loralib's API: `import phinetune.lora as lora`.

    layer = lora.Linear(in_features, out_features, r=16)
    lora.mark_only_lora_as_trainable(model)
    torch.save(lora.lora_state_dict(model), path)
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)

Where it differs from loralib, on purpose:

- loralib merges in place. Here `layer.weight` is the sum while the layer is merged, but the parameter itself stays as
  it is: `parameters()`, `state_dict()` and a layer with the same weight (`head.weight = emb.weight`) never see the
  update, and `train()` restores the weight to the bit.
- A gradient that has to reach the weight itself reaches it in evaluation mode, too.
- Arguments that make no sense are refused with a sentence. So is an adapter that would have no effect, as the out_proj
  of `nn.MultiheadAttention`.
- `lora.load_lora_state_dict(model, state)` is added. It refuses what does not fit, where
  `load_state_dict(state, strict=False)` leaves it out without a word.
- `lora.apply` and `lora.unload` are added. So are convolutions of every shape, and splits of unequal size.

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
