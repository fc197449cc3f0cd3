"""What every LoRA layer shares: its rank and scale, and merging that can be undone to the bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """A torch layer with a low-rank update beside its frozen weight. Mixed in before the torch layer's class.

    Attributes:
        r: rank; 0 is the plain layer.
        lora_alpha, scaling: scaling is alpha / r, or alpha / √r with rsLoRA (Kalajdzievski 2023).
        lora_dropout: dropout on what the adapter sees.
        merge_weights: whether `eval()` merges.
        merged: whether the weight holds the update now. `train()` unmerges.
        has_adapter: whether there are adapters at all.
    """

    r: int
    lora_alpha: float
    scaling: float
    merge_weights: bool
    merged: bool
    has_adapter: bool = False  # torch's constructor asks before `_set_up`
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _set_up(
        self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, use_rslora: bool = False
    ) -> None:
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
        self.lora_A = nn.Parameter(self.weight.new_zeros(shape_a))
        self.lora_B = nn.Parameter(self.weight.new_zeros(shape_b))
        self.weight.requires_grad = False
        self.has_adapter = True

    def reset_lora_parameters(self) -> None:
        """A as torch initialises a linear layer, B zero: the layer starts as its base (Hu et al. 2021, section 4.1)."""
        if self.has_adapter:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """The update that the adapter stands for, in the weight's shape and at least float32."""
        raise NotImplementedError

    def _base_weight(self) -> Tensor:
        """What the update is added to."""
        return self.weight

    def _drops(self) -> bool:
        """Whether dropout has anything to do now; asked each time, for users put in one of their own."""
        return self.training and type(self._modules["lora_dropout"]) is not nn.Identity

    # -- merging --------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Put the update into the weight: the sum in float32, cast once. The unmerged weight is kept aside.

        Raises:
            ValueError: the sum is not finite; FSDP holds the weight.
        """
        if self.merged or not self.has_adapter or self.weight.is_meta:
            return
        if self._is_sharded():
            raise ValueError("FSDP holds the weight: merge in a model that is not wrapped")
        with torch.no_grad():
            base, dtype = self._base_weight(), self.weight.dtype
            total = (base.to(torch.promote_types(dtype, torch.float32)) + self.delta_weight()).to(dtype)
        if not torch.isfinite(total).all():
            raise ValueError(f"merging gives values that are not finite in {type(self).__name__}; nothing was merged")
        self._unmerged = self.weight.data
        self.weight.data = total
        self.merged = True

    def unmerge(self) -> None:
        """Put the weight back as it was, to the bit."""
        if self.merged:
            assert self._unmerged is not None
            self.weight.data = self._unmerged
            self._unmerged = None
            self.merged = False

    def train(self, mode: bool = True) -> LoRALayer:
        """Training mode unmerges; evaluation mode merges where `merge_weights` says so."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights and not self._is_sharded():
            self.merge()
        return self

    def _is_sharded(self) -> bool:
        """Whether FSDP (1 or 2) holds the storage: it would write over the weight kept aside, or never see the sum."""
        return hasattr(self.weight, "_fsdp_flattened") or hasattr(self.weight, "device_mesh")

    def unloaded(self) -> nn.Module:
        """A plain torch layer with the update merged in; this layer stays as it is."""
        was_merged = self.merged
        self.merge()
        try:
            return self._plain(self.weight.detach().clone())
        finally:
            if not was_merged:
                self.unmerge()

    def _plain(self, weight: Tensor) -> nn.Module:
        raise NotImplementedError

    # -- saving, loading, moving: always the unmerged weight --------------------------------------------------

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
    """Give `layer`, made on the meta device, the base's weight and bias (their storage, no copy) and fresh adapters.

    The parameters are new objects over the same storage: a tied twin of the base keeps its own, so merging here
    leaves it alone.
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
