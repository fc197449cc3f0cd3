"""What all LoRA layers share: rank and scale, and a merge that leaves the weight itself alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from phinetune.lora.arguments import check_arguments
from phinetune.lora.merged import MergedWeight

# What an adapted layer has besides the attributes of torch's own class.
OWN_ATTRIBUTES = frozenset(
    [
        *("r", "lora_alpha", "scaling", "merge_weights", "merged", "has_adapter", "_sum", "_fast_path_guard"),
        *("fan_in_fan_out", "enable_lora", "splits", "_spans"),
    ]
)


class LoRALayer(nn.Module):
    """A torch layer with a frozen weight and a low-rank update of it.

    It is a mixin. A subclass names it before the torch layer's class.

    While the layer is merged, `layer.weight` is the sum of the weight and the update, as in loralib. But loralib adds
    to the weight in place, and subtracts later. Here the sum is a tensor of its own: the parameter that
    `parameters()`, `state_dict()` and a tied layer see is always the weight itself. So unmerging is exact, no tied
    layer sees the update, and a checkpoint never holds merged weights.

    Attributes:
        r: rank. With 0 the layer has no adapter and computes what torch's own layer does.
        lora_alpha, scaling: the update is multiplied by scaling, which is alpha / r, or alpha / √r with rsLoRA
            (Kalajdzievski 2023).
        lora_dropout: dropout on the adapter's input.
        merge_weights: whether `eval()` merges.
        merged: whether `weight` is the sum now. `train()` unmerges.
        has_adapter: whether the layer has an adapter.
    """

    r: int
    lora_alpha: float
    scaling: float
    merge_weights: bool
    # torch's constructor reads these three before `_set_up` has run.
    merged: bool = False
    has_adapter: bool = False
    _sum: MergedWeight | None = None
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _set_up(
        self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, use_rslora: bool = False
    ) -> None:
        """Set the attributes. Each subclass's constructor calls this once, after torch's constructor."""
        check_arguments(r, lora_alpha, lora_dropout, {"merge_weights": merge_weights, "use_rslora": use_rslora})
        self.r = r
        self.lora_alpha = lora_alpha
        self.merge_weights = merge_weights
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self._fast_path_guard: RemovableHandle | None = None

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

    def _own_weight(self) -> Tensor:
        """The weight itself, also while the layer is merged."""
        own = self._parameters.get("weight")
        # FSDP's flat views, DataParallel's copies and torch's parametrizations are attributes, not parameters.
        return self.weight if own is None else own

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._sum is not None:
            own = self._parameters.get(name)
            # Else the weight was replaced since, or FSDP asks, which would write the sum into its own storage.
            if own is not None and own is self._sum.parts[0] and not self._is_sharded():
                if not (torch.compiler.is_compiling() or self._sum.is_written() or self._sum.is_of(self._parts())):
                    self.merge()
                # torch's fast paths ask `weight` whether anything needs a gradient.
                return self._sum.weight.requires_grad_(own.requires_grad)
        return super().__getattr__(name)

    def _drops(self) -> bool:
        """Whether dropout is active now. This is checked at each call, as users replace `lora_dropout` later."""
        return self.training and type(self._modules["lora_dropout"]) is not nn.Identity

    # -- merging --------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Make `weight` the sum of the weight and the update. Does nothing on the meta device.

        The sum is computed in float32, or the weight's wider dtype, and rounded once. If the layer is merged already,
        the sum is made anew if what it was made of has changed.

        Raises:
            ValueError: the sum has values that are not finite, or the weight is not the layer's own: FSDP, a
                parametrization, weight norm or pruning manages it. Nothing is merged then.
        """
        if not self.has_adapter or self._own_weight().is_meta or (self._sum and self._sum.is_of(self._parts())):
            return
        if not self._owns_weight():
            raise ValueError(
                f"{self._manager()} manages the weight, so it can't be merged: merge in a model without that"
            )
        if self._sum is not None:
            self._check_sum(self._sum)
            self._drop_sum()
        # Not as an inference tensor: the sum outlives the block of code that asks for it.
        with torch.inference_mode(False), torch.no_grad():
            base, dtype = self._base_weight(), self._own_weight().dtype
            total = (base.to(torch.promote_types(dtype, torch.float32)) + self.delta_weight()).to(dtype)
        if not torch.isfinite(total).all():
            raise ValueError(
                f"the merged {type(self).__name__} would have values that are not finite; nothing was merged"
            )
        self._sum = MergedWeight.of(total, self._parts())
        self.merged = True
        self._guard_from_fast_path()

    def unmerge(self) -> None:
        """Make `weight` the weight itself again. Does nothing if the layer is not merged.

        Raises:
            ValueError: the sum was written to, or something took it for the weight, while the layer was merged.
        """
        if self._sum is None:
            return
        self._check_sum(self._sum)
        self._drop_sum()

    def _drop_sum(self) -> None:
        self._sum, self.merged = None, False
        self._guard_from_fast_path()

    def _current_sum(self) -> Tensor | None:
        """The sum that a forward uses; None if it has to compute with the weight and the adapter apart.

        Apart: if the layer is not merged, and if a gradient has to reach the weight itself. If the weight, A or B has
        changed since the sum was made, for example through a tied layer, the sum is made anew.
        """
        if self._sum is None:
            return None
        if torch.compiler.is_compiling():  # the compiler can't read a tensor's version
            return self._sum.weight
        weight, *_ = parts = self._parts()
        if not self._sum.is_of(parts):
            self._check_sum(self._sum)
            # Under FSDP, in functional_call and in DataParallel's copies the parts are other tensors for one call.
            if not (self._owns_weight() and all(isinstance(part, nn.Parameter) for part in parts)):
                return None
            self.merge()
        apart = weight is not None and weight.requires_grad and torch.is_grad_enabled()
        return None if apart else self._sum.weight

    def _check_sum(self, made: MergedWeight) -> None:
        """Raise a ValueError if someone took the sum for the weight itself; the sum is dropped then."""
        taken = not (self._owns_weight() or self._is_sharded() or getattr(self, "_is_replica", False))
        if taken or made.is_written():
            self._drop_sum()
            raise ValueError(
                f"the merged weight of a {type(self).__name__} was "
                + (f"taken over by {self._manager()}" if taken else "written to")
                + ", so it can't be unmerged: call train() before such a change"
            )

    def _parts(self) -> tuple[Tensor | None, ...]:
        """What the sum is made of: the weight, A and B."""
        held = self._parameters
        return held.get("weight"), held.get("lora_A"), held.get("lora_B")

    def train(self, mode: bool = True) -> LoRALayer:
        """Set training or evaluation mode. Training mode unmerges. Evaluation mode merges if `merge_weights` is set.

        If something else manages the weight (see `merge`), evaluation mode does not merge.

        Returns:
            the layer itself.
        """
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_weights and self._owns_weight():
            self.merge()
        self._guard_from_fast_path()
        return self

    def _owns_weight(self) -> bool:
        """Whether the weight is a parameter of the layer, and the layer alone manages its storage."""
        return "weight" in self._parameters and not self._is_sharded()

    def _is_sharded(self) -> bool:
        """Whether FSDP (version 1 or 2) manages the weight's storage. It would not see a sum."""
        weight = self._own_weight()
        return hasattr(weight, "_fsdp_flattened") or hasattr(weight, "device_mesh")

    def _manager(self) -> str:
        return "FSDP" if self._is_sharded() else "a parametrization, weight norm or pruning"

    def _guard_from_fast_path(self) -> None:
        """In evaluation mode, `nn.TransformerEncoderLayer` reads `linear1.weight` and does not call `linear1`.

        That is right for a merged layer. Else it would leave out the adapter. torch does not take this way if a layer
        in it has a hook. So a layer that is in evaluation mode and is not merged has one, which does nothing.
        """
        needed = self.has_adapter and not self.training and not self.merged
        if needed and self._fast_path_guard is None:
            self._fast_path_guard = self.register_forward_pre_hook(_do_nothing)
        elif not needed:
            self.remove_guard()

    def remove_guard(self) -> None:
        """Take away the hook that `_guard_from_fast_path` has set, if there is one."""
        if self._fast_path_guard is not None:
            self._fast_path_guard.remove()
            self._fast_path_guard = None

    def unloaded(self) -> nn.Module:
        """A new layer of torch's own class, with the update merged into its weight. This layer does not change.

        Raises:
            ValueError: as `merge`.
        """
        was_merged = self.merged
        self.merge()
        try:
            layer: Any = self._torch_layer()
            layer.weight = nn.Parameter(self._torch_weight().detach().clone())
        finally:
            if not was_merged:
                self.unmerge()
        if getattr(self, "bias", None) is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        made: nn.Module = layer.train(self.training)
        return made

    def _torch_layer(self) -> nn.Module:
        """A layer of torch's own class with this layer's settings, on the meta device."""
        raise NotImplementedError

    def _torch_weight(self) -> Tensor:
        """`weight` as torch's own class stores it."""
        return self.weight

    # -- after loading or moving, the sum is made anew ----------------------------------------------------------

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


def _do_nothing(*_: Any) -> None:
    """A forward hook. That it is there is all it is for."""
