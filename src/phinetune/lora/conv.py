"""Convolutions with a low-rank update, in loralib's parameter shapes.

As in loralib, the update of the kernel is the product B A of two matrices, reshaped to the kernel's shape. For a kernel
of size (k₁, …, kₙ), A has the shape (r·kₙ, in·kₙ), and B has the shape (out/groups · k₁…kₙ₋₁, r·kₙ). For a square
`Conv2d` these are loralib's own shapes. They also fit the kernels for which loralib's shapes do not: those that are not
square, and those of `Conv1d` and `Conv3d` with a size above 1. In this layout the update is not a composition of two
convolutions. So each step builds the update's kernel, which is as small as the kernel itself.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from phinetune.lora.adoption import adopt, check_base
from phinetune.lora.base import LoRALayer

# loralib names a convolution's own parameters `conv.weight` and `conv.bias`.
LORALIB_PREFIX = "conv."

Made = TypeVar("Made", bound="_ConvBase")


class _ConvBase(LoRALayer):
    """A mixin for torch's convolutions.

    Parameters have torch's names. Loading also accepts loralib's names, `conv.weight` and `conv.bias`.

    Args:
        in_channels, out_channels, kernel_size: as in torch's convolution.
        r, lora_alpha, merge_weights, use_rslora: as in `Linear`.
        lora_dropout: dropout on the input of the update's convolution.
        kwargs: the other arguments of torch's convolution.

    Raises:
        ValueError: a negative rank, or a dropout outside [0, 1).
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        super(LoRALayer, self).__init__(in_channels, out_channels, kernel_size, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights, use_rslora)
        if r:
            last, before = self.kernel_size[-1], math.prod(self.kernel_size[:-1])
            rows = self.out_channels // self.groups * before
            self._add_adapter((r * last, self.in_channels * last), (rows, r * last))
        self.reset_parameters()

    @classmethod
    def from_base(cls: type[Made], layer: Any, r: int, **options: Any) -> Made:
        """An adapted layer that shares the storage of `layer`'s kernel and bias. Nothing is copied.

        Raises:
            ValueError: `layer` is not plainly torch's convolution (see `adoption.obstacle`), or as in the class.
        """
        check_base(layer, _plain(cls))
        made = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, r, **options, **_settings(layer), device="meta"
        )
        adopt(made, layer)
        return made

    @property
    def conv(self: Made) -> Made:
        """The layer itself. In loralib, this attribute is the convolution that its layer holds."""
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        self.reset_lora_parameters()

    def delta_weight(self) -> Tensor:
        """s · B A in the kernel's shape."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).view(self.weight.shape) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x and the result have the shapes of torch's convolution."""
        merged = self._current_sum() if self.has_adapter else self.weight
        if merged is not None:
            return self._convolve(x, merged, self.bias)
        weight = self._own_weight()
        delta = (self.lora_B @ self.lora_A).view(weight.shape).to(weight.dtype) * self.scaling
        if self._drops():
            return self._convolve(x, weight, self.bias) + self._convolve(self.lora_dropout(x), delta, None)
        return self._convolve(x, weight + delta, self.bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}{LORALIB_PREFIX}{name}" in state:
                state[f"{prefix}{name}"] = state.pop(f"{prefix}{LORALIB_PREFIX}{name}")
        super()._load_from_state_dict(state, prefix, *rest)

    def _torch_layer(self) -> nn.Module:
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        layer: nn.Module = _plain(type(self))(*sizes, **_settings(self), device="meta")
        return layer


def _plain(kind: type[nn.Module]) -> Any:
    """torch's own class of convolution that `kind` adapts."""
    return next(c for c in kind.__mro__ if c in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _settings(layer: Any) -> dict[str, Any]:
    """A convolution's settings, as keyword arguments for its constructor."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    same = {name: getattr(layer, name) for name in names}
    return {**same, "bias": layer.bias is not None, "dtype": layer.weight.dtype}


class Conv1d(_ConvBase, nn.Conv1d):
    """`nn.Conv1d` with a low-rank update."""


class Conv2d(_ConvBase, nn.Conv2d):
    """`nn.Conv2d` with a low-rank update."""


class Conv3d(_ConvBase, nn.Conv3d):
    """`nn.Conv3d` with a low-rank update."""
