"""What all LoRA layers share: rank and scale, and a merge that `unmerge` undoes exactly, to the bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """A torch layer with a frozen weight and a low-rank update of it.

    It is a mixin. A subclass names it before the torch layer's class.

    Attributes:
        r: rank. With 0 the layer has no adapter and computes what torch's own layer does.
        lora_alpha, scaling: the update is multiplied by scaling, which is alpha / r, or alpha / √r with rsLoRA
            (Kalajdzievski 2023).
        lora_dropout: dropout on the adapter's input.
        merge_weights: whether `eval()` merges.
        merged: whether the weight holds the update now. `train()` unmerges.
        has_adapter: whether the layer has an adapter.
    """

    r: int
    lora_alpha: float
    scaling: float
    merge_weights: bool
    merged: bool
    has_adapter: bool = False  # torch's constructor reads it before `_set_up` has run
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _set_up(
        self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, use_rslora: bool = False
    ) -> None:
        """Set the attributes. Each subclass's constructor calls this once, after torch's constructor."""
        if r < 0:
            raise ValueError(f"r must be 0 (no adapter) or more, not {r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {lora_dropout}")
        self.r = r
        self.lora_alpha = lora_alpha
        self.merge_weights = merge_weights
        self.merged = False
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self._unmerged: Tensor | None = None

    def _add_adapter(self, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> None:
        """Make A and B, filled with zeros, and freeze the weight."""
        self.lora_A = nn.Parameter(self.weight.new_zeros(shape_a))
        self.lora_B = nn.Parameter(self.weight.new_zeros(shape_b))
        self.weight.requires_grad = False
        self.has_adapter = True

    def reset_lora_parameters(self) -> None:
        """Initialise A as torch initialises a linear layer, and B with zeros (Hu et al. 2021, section 4.1).

        So a new layer computes what its base computes.
        """
        if self.has_adapter:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """The update that the adapter stands for, in the weight's shape, in float32 or a wider dtype."""
        raise NotImplementedError

    def _base_weight(self) -> Tensor:
        """The weight to which the update is added."""
        return self.weight

    def _drops(self) -> bool:
        """Whether dropout is active now. This is checked at each call, as users replace `lora_dropout` later."""
        return self.training and type(self._modules["lora_dropout"]) is not nn.Identity

    # -- merging --------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Add the update to the weight. Does nothing if it is merged already, or is on the meta device.

        The sum is computed in float32, or the weight's wider dtype, and rounded once. The layer keeps the unmerged
        weight.

        Raises:
            ValueError: the sum has values that are not finite, or FSDP manages the weight. Nothing is merged then.
        """
        if self.merged or not self.has_adapter or self.weight.is_meta:
            return
        if self._is_sharded():
            raise ValueError("FSDP manages the weight, so it can't be merged: merge in a model that FSDP does not wrap")
        with torch.no_grad():
            base, dtype = self._base_weight(), self.weight.dtype
            total = (base.to(torch.promote_types(dtype, torch.float32)) + self.delta_weight()).to(dtype)
        if not torch.isfinite(total).all():
            raise ValueError(
                f"the merged {type(self).__name__} would have values that are not finite; nothing was merged"
            )
        self._unmerged = self.weight.data
        self.weight.data = total
        self.merged = True

    def unmerge(self) -> None:
        """Restore the weight exactly, to the bit. Does nothing if it is not merged."""
        if self.merged:
            assert self._unmerged is not None
            self.weight.data = self._unmerged
            self._unmerged = None
            self.merged = False

    def train(self, mode: bool = True) -> LoRALayer:
        """Set training or evaluation mode. Training mode unmerges. Evaluation mode merges if `merge_weights` is set.

        If FSDP manages the weight, evaluation mode does not merge.

        Returns:
            the layer itself.
        """
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights and not self._is_sharded():
            self.merge()
        return self

    def _is_sharded(self) -> bool:
        """Whether FSDP (version 1 or 2) manages the weight's storage.

        Merging would fail then: FSDP would overwrite the kept weight, or would not see the sum.
        """
        return hasattr(self.weight, "_fsdp_flattened") or hasattr(self.weight, "device_mesh")

    def unloaded(self) -> nn.Module:
        """A new layer of torch's own class, with the update merged into its weight. This layer does not change.

        Raises:
            ValueError: as `merge`.
        """
        was_merged = self.merged
        self.merge()
        try:
            return self._torch_layer(self.weight.detach().clone())
        finally:
            if not was_merged:
                self.unmerge()

    def _torch_layer(self, weight: Tensor) -> nn.Module:
        """A layer of torch's own class with this layer's settings and bias, and with `weight`."""
        raise NotImplementedError

    # -- saving, loading and moving use the unmerged weight ---------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self._unmerged

    def _load_from_state_dict(self, *args: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args)
        if merged:
            self.merge()

    def _apply(self, *args: Any, **kwargs: Any) -> LoRALayer:
        merged = self.merged
        self.unmerge()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if merged:
            self.merge()
        return self

    def extra_repr(self) -> str:
        kind = f", r={self.r}, lora_alpha={self.lora_alpha}" if self.r else ", r=0"
        return super().extra_repr() + kind + (", merged" if self.merged else "")


def adopt(layer: LoRALayer, base: nn.Module) -> None:
    """Give `layer`, made on the meta device, the weight and bias of `base`, and a newly initialised adapter.

    The weight and bias share the base's storage; nothing is copied. But the parameters are new objects. If another
    layer is tied to the base's weight, it keeps the old object, so merging `layer` does not change that other layer.
    """
    source: Any = base
    for name in ("weight", "bias"):
        tensor = getattr(source, name, None)
        if tensor is not None:
            trains = tensor.requires_grad and (name == "bias" or not layer.has_adapter)
            setattr(layer, name, nn.Parameter(tensor.detach(), requires_grad=trains))
    if layer.has_adapter:
        for name in ("lora_A", "lora_B"):
            empty = torch.empty_like(getattr(layer, name), device=source.weight.device)
            setattr(layer, name, nn.Parameter(empty))
        layer.reset_lora_parameters()
    layer.train(base.training)
