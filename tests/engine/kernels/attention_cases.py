"""Forests of segments, and attention over them under a dense mask: the reference of every form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from phinetune.engine.attention_plan import Heads, plan, trees_run
from phinetune.engine.kernels import attention as kernel
from phinetune.engine.kernels.attention import attention
from phinetune.engine.segments import read_segments

Table = tuple[tuple[int, int, int], ...]

CPU = torch.device("cpu")
SIZE = 8
GROUPED, NINE, UNGROUPED = (Heads(heads, kv, SIZE, 0.4) for heads, kv in [(4, 2), (9, 3), (3, 3)])

# Each segment's length and parent.
FORESTS: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, -1)],
    "one root": [(150, -1)],
    "roots of odd lengths": [(1, -1), (5, -1), (63, -1), (64, -1), (65, -1), (130, -1), (200, -1)],
    "two levels": [(20, -1), (7, 0), (70, 0), (1, 0), (8, 0)],
    "three levels": [(17, -1), (30, 0), (5, 1), (66, 1), (3, 0), (9, -1), (40, 5), (35, 6), (34, 6)],
    "a branch without a sibling": [(65, -1), (64, 0)],
    "siblings of very different lengths": [(3, -1), (1, 0), (150, 0), (10, 0), (11, 0)],
    "trees among roots": [(12, -1), (30, -1), (9, 1), (8, 1), (12, -1), (11, -1), (3, 5)],
}
each_forest = pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS.keys())
each_heads = pytest.mark.parametrize("heads", [GROUPED, NINE, UNGROUPED], ids=["4 over 2", "9 over 3", "3 over 3"])


def table(forest: Sequence[tuple[int, int]]) -> Table:
    rows, start = [], 0
    for length, parent in forest:
        rows.append((start, start + length, parent))
        start += length
    return tuple(rows)


def inputs(
    tokens: int, heads: Heads, dtype: torch.dtype, rotated: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv; cos and sin of any angles, scaled as longrope does; a gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    size = heads.size

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    angles = 2 * draw(tokens, (rotated or size // 2 * 2) // 2)
    drawn = (draw(tokens, heads.total * size), 1.2 * angles.cos(), 1.2 * angles.sin(), draw(tokens, heads.heads * size))
    qkv, cos, sin, grad = (tensor.to(dtype) for tensor in drawn)
    return qkv, cos, sin, grad


@functools.cache
def sees(segments: Table, window: int | None) -> Tensor:
    """Which tokens (rows) see which (columns)."""
    mask = torch.zeros(segments[-1][1], segments[-1][1], dtype=torch.bool)
    contexts: list[list[int]] = []
    for start, stop, parent in segments:
        above = contexts[parent] if parent >= 0 else []
        contexts.append(context := [*above, *range(start, stop)])
        for place in range(len(above), len(context)):
            first = 0 if window is None else max(0, place - window + 1)
            mask[context[place], context[first : place + 1]] = True
    return mask


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Table, heads: Heads) -> Tensor:
    """In float64, over the whole row at once."""
    cos, sin = (torch.cat([part, part], dim=-1)[None].double() for part in (cos, sin))
    states = qkv.double().view(1, len(qkv), -1, heads.size).transpose(1, 2)
    q, k, v = states.split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k, v = (part.repeat_interleave(heads.shared, dim=1) for part in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees(segments, heads.window), scale=heads.scaling)
    return out[0].transpose(0, 1).reshape(len(qkv), -1)


def attend(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Table, heads: Heads, native: bool = False) -> Tensor:
    fused = functools.partial(kernel.fuses, heads=heads, dtype=qkv.dtype, device=CPU)
    rows = torch.tensor(segments)
    runs = [trees_run(rows)] if native else plan(read_segments(rows), heads, CPU, fused)
    return attention(qkv.clone(), cos, sin, runs, heads)  # it overwrites its input


def both(
    forest: Sequence[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype,
    rotated: int | None = None,
    native: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of qkv: ours, and the reference's in float64."""
    segments = table(forest)
    qkv, cos, sin, grad = inputs(segments[-1][1], heads, dtype, rotated)
    results = []
    for run in (functools.partial(attend, native=native), reference):
        leaf = qkv.clone().requires_grad_()
        out = run(leaf, cos, sin, segments, heads)
        out.backward(grad.to(out.dtype))
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    assert results[0][0].dtype == dtype
    return list(zip(*results, strict=True))


def assert_equal_to_the_reference(
    forest: Sequence[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype = torch.float64,
    rotated: int | None = None,
    native: bool = False,
) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for found, wanted in both(forest, heads, dtype, rotated, native):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def below(segments: Table, i: int) -> set[int]:
    """A segment and all that branches from it."""
    family = {i}
    for j, (_, _, parent) in enumerate(segments):
        if parent in family:
            family.add(j)
    return family


def assert_no_gradient_beside_and_below(forest: Sequence[tuple[int, int]], native: bool = False) -> None:
    """A segment's output gives a gradient to its own tokens and those of its ancestors alone."""
    segments = table(forest)
    qkv, cos, sin, _ = inputs(segments[-1][1], GROUPED, torch.float32)
    for i, (start, stop, _) in enumerate(segments):
        leaf = qkv.clone().requires_grad_()
        attend(leaf, cos, sin, segments, GROUPED, native)[start:stop].sum().backward()
        assert leaf.grad is not None
        reached = {j for j, (first, last, _) in enumerate(segments) if leaf.grad[first:last].any()}
        assert reached == {j for j in range(len(segments)) if i in below(segments, j)}, f"from segment {i}"


def assert_others_change_no_bit(
    forest: Sequence[tuple[int, int]], dtype: torch.dtype, change: Callable[[Tensor], Tensor], native: bool = False
) -> None:
    """What is done to a segment's tokens changes its own output and that of the segments below it alone."""
    segments = table(forest)
    qkv, cos, sin, _ = inputs(segments[-1][1], GROUPED, dtype)
    before = attend(qkv, cos, sin, segments, GROUPED, native)
    for i, (start, stop, _) in enumerate(segments):
        other = qkv.clone()
        other[start:stop] = change(other[start:stop])
        after = attend(other, cos, sin, segments, GROUPED, native)
        changed = {j for j, (a, b, _) in enumerate(segments) if not torch.equal(before[a:b], after[a:b])}
        assert changed == below(segments, i), f"after a change in segment {i}"
