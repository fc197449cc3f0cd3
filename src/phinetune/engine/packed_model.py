"""A decoder of `packed_layers`, and the model with its head, which is applied only where a label is predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from phinetune.engine.activation_memory import Level
from phinetune.engine.even_rows import evened
from phinetune.engine.kernels import rotary
from phinetune.engine.kernels.attention import planned
from phinetune.engine.kernels.cross_entropy import linear_cross_entropy, linear_label_numbers, linear_log_probs
from phinetune.engine.outputs import ConversationOutput, PackedOutput
from phinetune.engine.packed_layers import Packed, PackedMLP, Phi3RMSNorm, RowAttention
from phinetune.engine.segments import Segment, read_segments


def rope_limit(config: Any) -> int | None:
    """The length in tokens up to which a conversation rotates by longrope's short factors; None without longrope."""
    rope = config.rope_parameters
    return int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None


class PackedDecoder(nn.Module):
    """The decoder.

    Attributes:
        activation_levels: given a row's number of tokens, returns what each layer keeps for the backward. None: all.
    """

    activation_levels: Callable[[int], Sequence[Level]] | None = None
    config: Any
    embed_tokens: Any
    layers: nn.ModuleList
    norm: Any
    rotary_emb: Any

    def compile_operators(self) -> None:
        """From now on, run norms and SwiGLU compiled."""
        for module in self.modules():
            if isinstance(module, (Phi3RMSNorm, PackedMLP)):
                module.compile_ops = True

    def packed(
        self,
        input_ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        predicts: Tensor,
        on_qkv: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The decoder's output for a packed row, after the last norm.

        Args:
            input_ids, positions: shape (tokens).
            segments: shape (segments, 3), see `phinetune.engine.segments`.
            predicts: positions whose output is wanted, shape (labels).
            on_qkv: see `Packed`.

        Returns:
            shape (labels, width).
        """
        hidden = self.embed_tokens(input_ids)
        parts = read_segments(segments)
        cos, sin = self._rotation(positions, parts)
        levels = self._levels(len(positions))
        first: Any = self.layers[0]
        runs = planned(segments, parts, first.self_attn.heads, hidden)
        row = Packed(runs, cos.to(hidden.dtype), sin.to(hidden.dtype), predicts, levels, on_qkv)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, packed=row, rows=predicts if i == last else None, level=levels[i])
        return self.norm(hidden)  # type: ignore[no-any-return]

    def step(self, input_ids: Tensor, row: RowAttention) -> Tensor:
        """The decoder's output for the next token of each conversation, after the last norm.

        Args:
            input_ids: shape (conversations).
            row: attends to the tokens before.

        Returns:
            shape (conversations, width).
        """
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, packed=row)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def _levels(self, tokens: int) -> Sequence[Level]:
        if self.activation_levels is None or not torch.is_grad_enabled():
            return [Level.KEEP] * len(self.layers)
        return self.activation_levels(tokens)

    def _rotation(self, positions: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """cos and sin. Conversations beyond longrope's first limit get its long factors, together with their tree."""
        cos, sin = self.rotation(positions, long=False)
        limit = rope_limit(self.config)
        if limit is None:
            return cos, sin
        for start, stop in _trees(segments):
            if int(positions[start:stop].max()) >= limit:
                cos[start:stop], sin[start:stop] = self.rotation(positions[start:stop], long=True)
        return cos, sin

    def rotation(self, positions: Tensor, *, long: bool) -> tuple[Tensor, Tensor]:
        """cos and sin, each of shape (tokens, m) in float32. `long` takes longrope's long factors."""
        emb = self.rotary_emb
        frequencies: Tensor = emb.original_inv_freq
        if long:
            limit = rope_limit(emb.config) or 0
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](emb.config, positions.device, seq_len=limit + 1)
        return rotary.tables(frequencies, positions, emb.attention_scaling)


def _trees(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The range of tokens of each tree: a root with all its branches."""
    starts = [segment.start for segment in segments if not segment.above]
    return list(zip(starts, [*starts[1:], segments[-1].stop], strict=True))


class PackedCausalLM(nn.Module):
    """A decoder and its head. Called with `segments`, it takes a packed row and returns a loss or log-probabilities."""

    model: Any
    config: Any
    device: Any
    dtype: Any
    get_output_embeddings: Callable[[], Any]

    def forward(self, *args: Any, segments: Tensor | None = None, **kwargs: Any) -> Any:
        """Without `segments`, what the parent does. With `segments`, the loss of a packed row (see `packed_loss`), or
        with `owners` too the log-probabilities of its conversations (see `packed_log_probs`).
        """
        if segments is None:
            return super().forward(*args, **kwargs)
        owned = kwargs.get("owners") is not None
        given = ("input_ids", "position_ids", "predicts", "labels")
        more = ("owners", "conversations") if owned else ("weights",)
        chosen = {"segments": segments, **{key: kwargs[key] for key in (*given, *more)}}
        chosen = evened(chosen, self.config, self.model.norm.weight)
        if owned:
            chosen["spread"] = kwargs.get("spread", False)
        return (self.packed_log_probs if owned else self.packed_loss)(**chosen)

    def packed_loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        predicts: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> PackedOutput:
        """The summed loss of a packed row.

        Args:
            input_ids, position_ids: shape (1, tokens).
            segments: shape (segments, 3), see `phinetune.engine.segments`.
            predicts: for each label the position whose output predicts it, shape (labels).
            labels: token ids, shape (labels).
            weights: how many conversations share each label, shape (labels), float32.
        """
        hidden = self.model.packed(input_ids[0], position_ids[0], segments, predicts)
        nll, correct = linear_cross_entropy(hidden, self._head_weight, labels, weights)
        return PackedOutput(nll=nll, correct=correct, count=weights.sum())

    def packed_log_probs(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        predicts: Tensor,
        labels: Tensor,
        owners: Tensor,
        conversations: Tensor,
        spread: bool = False,
    ) -> ConversationOutput:
        """The summed log-probabilities of each conversation in a packed row.

        Args:
            input_ids, position_ids, segments, predicts, labels: see `packed_loss`.
            owners: pairs of a label's index and the number of a conversation that has this label, shape (pairs, 2); see
                `phinetune.engine.packing`. A label that several conversations share counts for each of them.
            conversations: how many conversations there are, a scalar.
            spread: whether to give `entropy` and `logits` too, which reads the logits once more.
        """
        hidden = self.model.packed(input_ids[0], position_ids[0], segments, predicts)
        numbers = (linear_label_numbers if spread else linear_log_probs)(hidden, self._head_weight, labels)
        place, owner = owners.unbind(1)
        zeros = torch.zeros(int(conversations), dtype=torch.float32, device=hidden.device)

        def sums(one: Tensor) -> Tensor:
            return zeros.index_add(0, owner, one[place])

        log_probs, first, *more = (sums(one) for one in numbers)
        count = sums(torch.ones_like(numbers[1]))
        return ConversationOutput(log_probs, first, count, *more)

    @property
    def _head_weight(self) -> Tensor:
        weight: Tensor = self.get_output_embeddings().weight
        return weight
