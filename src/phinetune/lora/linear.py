"""`Linear`, `MergedLinear` and `Embedding`, with loralib's signatures, attributes and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phinetune.lora.adoption import adopt, check_base
from phinetune.lora.arguments import check_enable_lora, check_switch
from phinetune.lora.base import LoRALayer
from phinetune.lora.functional import Span, delta_weight, lora_linear


class _LinearBase(LoRALayer, nn.Linear):
    """What `Linear` and `MergedLinear` share: the product, and weights that may be stored as (in, out)."""

    fan_in_fan_out: bool
    _spans: tuple[Span, ...] | None

    def _transposed(self, weight: Tensor) -> Tensor:
        """The weight, transposed if `fan_in_fan_out`. This turns the stored layout into (out, in), and back."""
        return weight.t() if self.fan_in_fan_out else weight

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.reset_lora_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Takes x of shape (..., in_features), gives shape (..., out_features)."""
        merged = self._current_sum() if self.has_adapter else self.weight
        if merged is not None:
            return F.linear(x, self._transposed(merged), self.bias)
        held: dict[str, Any] = self._parameters
        try:  # without nn.Module's attribute lookup, which takes a twentieth of a small layer's time
            weight, bias, a, b = held["weight"], held["bias"], held["lora_A"], held["lora_B"]
        except KeyError:  # FSDP's flat views and torch's parametrizations are attributes, not parameters
            weight, bias, a, b = self.weight, self.bias, self.lora_A, self.lora_B
        if self.fan_in_fan_out:
            weight = weight.t()
        seen = self.lora_dropout(x) if self._drops() else None
        if x.is_nested and seen is None:  # nn.TransformerEncoder makes such rows of different lengths of a padded batch
            update = self.delta_weight().to(weight.dtype)
            return F.linear(x, weight, bias) + F.linear(x, self._transposed(update))
        return lora_linear(x, weight, bias, a, b, self.scaling, seen, self._spans)

    def delta_weight(self) -> Tensor:
        """s · B A in the weight's shape."""
        return self._transposed(delta_weight(self.lora_A, self.lora_B, self.scaling, self.out_features, self._spans))

    def _torch_layer(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def _torch_weight(self) -> Tensor:
        return self._transposed(self.weight).contiguous()


class Linear(_LinearBase):
    """`nn.Linear` with a low-rank update: lora_A (r, in_features), lora_B (out_features, r).

    Args:
        r: rank. With 0 the layer has no adapter and computes what `nn.Linear` does.
        lora_alpha: the update is multiplied by alpha / r.
        lora_dropout: dropout on the adapter's input.
        fan_in_fan_out: whether the weight is stored as (in_features, out_features).
        merge_weights: whether `eval()` merges and `train()` unmerges.
        use_rslora: whether the update is multiplied by alpha / √r instead.
        kwargs: the other arguments of `nn.Linear`: bias, device, dtype.

    Raises:
        ValueError: a negative rank, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        check_switch("fan_in_fan_out", fan_in_fan_out)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights, use_rslora)
        self.fan_in_fan_out = fan_in_fan_out
        self._spans = None
        if r:
            self._add_adapter((r, in_features), (out_features, r))
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()

    @classmethod
    def from_base(cls, layer: nn.Linear, r: int, **options: Any) -> Linear:
        """An adapted layer that shares the storage of `layer`'s weight and bias. Nothing is copied.

        Raises:
            ValueError: `layer` is not plainly an `nn.Linear` (see `adoption.obstacle`); `fan_in_fan_out` is set; or as
                in `Linear`.
        """
        check_base(layer, nn.Linear)
        kind: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}
        _check_layout(options)
        made = cls(layer.in_features, layer.out_features, r, **options, **kind)
        adopt(made, layer)
        return made


class MergedLinear(_LinearBase):
    """One linear layer that stands for several, for example q, k and v. Each of these splits may have an adapter.

    As in loralib, lora_A has the shape (r · adapted splits, in_features), and lora_B has the shape (rows of the adapted
    splits, r).

    Args:
        out_features: the rows of all splits together, which all have the same size; or a sequence of the rows of each.
        enable_lora: which splits have an adapter.
        r, lora_alpha, …: as in `Linear`.

    Raises:
        ValueError: out_features can't be divided into that many equal splits, or names another number of splits than
            enable_lora; a negative rank, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        check_switch("fan_in_fan_out", fan_in_fan_out)
        splits = _split_sizes(out_features, enable_lora)
        nn.Linear.__init__(self, in_features, sum(splits), **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, merge_weights, use_rslora)
        self.enable_lora = list(enable_lora)
        self.splits = splits
        self.fan_in_fan_out = fan_in_fan_out
        self._spans = _spans(splits, self.enable_lora)
        if r and any(enable_lora):
            self._add_adapter((r * len(self._spans), in_features), (self._spans[-1][3], r))
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()

    @classmethod
    def from_base(cls, layer: nn.Linear, r: int, enable_lora: Sequence[bool], **options: Any) -> MergedLinear:
        """An adapted layer that shares the storage of `layer`'s weight and bias. Nothing is copied.

        Args:
            options: the other arguments of `MergedLinear`, and `splits`: the rows of each split. Without `splits`, all
                splits have the same size.

        Raises:
            ValueError: the splits do not add up to the layer's out_features, or as in `MergedLinear` and in
                `Linear.from_base`.
        """
        out = options.pop("splits", None) or layer.out_features
        if sum(_split_sizes(out, enable_lora)) != layer.out_features:
            raise ValueError(f"splits {out} don't add up to the layer's {layer.out_features} out_features")
        check_base(layer, nn.Linear)
        kind: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}
        _check_layout(options)
        made = cls(layer.in_features, out, r, enable_lora=enable_lora, **options, **kind)
        adopt(made, layer)
        return made

    @property
    def lora_ind(self) -> Tensor:
        """Which output features have an adapter: booleans of shape (out_features)."""
        return torch.cat(
            [
                torch.full((rows,), on, dtype=torch.bool, device=self.weight.device)
                for rows, on in zip(self.splits, self.enable_lora, strict=True)
            ]
        )

    def merge_AB(self) -> Tensor:
        """B A without the scaling, in the weight's shape. The method has loralib's name."""
        return self._transposed(delta_weight(self.lora_A, self.lora_B, 1.0, self.out_features, self._spans))


def _split_sizes(out_features: int | Sequence[int], enable_lora: Sequence[bool]) -> list[int]:
    """The rows of each split.

    Raises:
        ValueError: as in `MergedLinear`.
    """
    check_enable_lora(enable_lora)
    if isinstance(out_features, int):
        if out_features % len(enable_lora):
            raise ValueError(
                f"out_features {out_features} can't be divided into {len(enable_lora)} equal splits (enable_lora); "
                "give the rows of each split as a list"
            )
        return [out_features // len(enable_lora)] * len(enable_lora)
    if len(out_features) != len(enable_lora):
        raise ValueError(f"out_features names {len(out_features)} splits, but enable_lora names {len(enable_lora)}")
    if min(out_features) < 1:
        raise ValueError(f"each split needs one row or more, not {list(out_features)}")
    return list(out_features)


def _check_layout(options: Mapping[str, Any]) -> None:
    """Refuse `fan_in_fan_out` for an existing layer: its weight is stored as nn.Linear stores it."""
    if options.get("fan_in_fan_out"):
        raise ValueError("fan_in_fan_out: an nn.Linear stores its weight as (out_features, in_features); leave it out")


def _spans(splits: Sequence[int], enable_lora: Sequence[bool]) -> tuple[Span, ...]:
    """One span for each adapted split."""
    spans: list[Span] = []
    row = first = 0
    for rows, on in zip(splits, enable_lora, strict=True):
        if on:
            spans.append((row, row + rows, first, first + rows))
            first += rows
        row += rows
    return tuple(spans)


class Embedding(LoRALayer, nn.Embedding):
    """`nn.Embedding` with a low-rank update: lora_A (r, num_embeddings), lora_B (embedding_dim, r).

    As in loralib, A starts with zeros, and B with normally distributed numbers. The padding row gets no update.
    `max_norm` renormalises only the base's rows, without the update.

    Args:
        r, lora_alpha, merge_weights, use_rslora: as in `Linear`.
        kwargs: the other arguments of `nn.Embedding`.

    Raises:
        ValueError: a negative rank.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._set_up(r, lora_alpha, 0.0, merge_weights, use_rslora)
        if r:
            self._add_adapter((r, num_embeddings), (embedding_dim, r))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self.reset_lora_parameters()

    @classmethod
    def from_base(cls, layer: nn.Embedding, r: int, **options: Any) -> Embedding:
        """An adapted layer that shares the storage of `layer`'s weight. Nothing is copied.

        Raises:
            ValueError: `layer` is not plainly an `nn.Embedding` (see `adoption.obstacle`), or as in `Embedding`.
        """
        check_base(layer, nn.Embedding)
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        same = {name: getattr(layer, name) for name in names}
        kind: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
        made = cls(layer.num_embeddings, layer.embedding_dim, r, **options, **same, **kind)
        adopt(made, layer)
        return made

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Initialise A with zeros, and B with normally distributed numbers."""
        if self.has_adapter:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ids of any shape (...), gives shape (..., embedding_dim)."""
        merged = self._current_sum()
        if merged is not None:
            # Without max_norm: it would renormalise the sum, and so shrink the update.
            same = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
            return F.embedding(x, merged, self.padding_idx, **same)
        norm = (self.max_norm, self.norm_type)
        base = F.embedding(x, self._own_weight(), self.padding_idx, *norm, self.scale_grad_by_freq, self.sparse)
        if not self.has_adapter:
            return base
        # Never with sparse=True: torch can't transpose a sparse gradient back to A's shape.
        picked = F.embedding(x, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        if self.padding_idx is not None:
            picked = picked.masked_fill((x == self.padding_idx).unsqueeze(-1), 0)
        return base + (picked @ self.lora_B.t()).to(base.dtype) * self.scaling

    def _base_weight(self) -> Tensor:
        if self.max_norm is None:
            return self.weight
        return torch.renorm(self.weight, self.norm_type, 0, self.max_norm)

    def delta_weight(self) -> Tensor:
        """s · (B A)ᵀ, shape (num_embeddings, embedding_dim). The padding row is zero."""
        delta = delta_weight(self.lora_A, self.lora_B, self.scaling, self.embedding_dim, None).t()
        if self.padding_idx is not None:
            delta = delta.clone()
            delta[self.padding_idx] = 0
        return delta

    def _torch_layer(self) -> nn.Module:
        return nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            max_norm=None if self.has_adapter else self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
        )
