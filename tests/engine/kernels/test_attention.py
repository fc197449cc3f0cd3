"""Attention within segments equals attention over the whole row under a dense mask, and so does its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels.attention_cases import (
    CPU,
    FORESTS,
    GROUPED,
    NINE,
    SIZE,
    assert_equal_to_the_reference,
    assert_no_gradient_beside_and_below,
    assert_others_change_no_bit,
    attend,
    both,
    each_forest,
    each_heads,
    inputs,
    table,
)
from phinetune.engine.attention_plan import Groups, Heads, plan
from phinetune.engine.kernels import attention as kernel
from phinetune.engine.kernels import attention_products as products
from phinetune.engine.kernels import attention_ways
from phinetune.engine.kernels.attention import attention
from phinetune.engine.kernels.attention_products import _key_head_chunks
from phinetune.engine.kernels.attention_ways import Way
from phinetune.engine.kernels.matmul import scratch
from phinetune.engine.segments import read_segments


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than these products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def go(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute every group in this way."""
    monkeypatch.setattr(products, "_way", lambda group, heads, qkv: way)


def fuse_from(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer roots go to torch's fused attention, in every dtype."""
    monkeypatch.setattr(kernel, "fuses", lambda found, **_: found > length)


@each_forest
@each_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_those_under_a_dense_mask(
    forest: list[tuple[int, int]], heads: Heads, dtype: torch.dtype
) -> None:
    assert_equal_to_the_reference(forest, heads, dtype)


@each_forest
@each_heads
def test_bfloat16_is_near(forest: list[tuple[int, int]], heads: Heads) -> None:
    for found, wanted in both(forest, heads, torch.bfloat16):
        assert (found.double() - wanted.double()).norm() < 0.02 * wanted.double().norm()


@each_forest
@pytest.mark.parametrize("window", [1, 2, 9, 64, 100])
def test_a_sliding_window_is_crossed_inside_roots_and_from_branches(forest: list[tuple[int, int]], window: int) -> None:
    assert_equal_to_the_reference(forest, Heads(4, 2, SIZE, 0.4, window))


@pytest.mark.parametrize("name", ["roots of odd lengths", "three levels"])
@pytest.mark.parametrize("rotated", [2, 4])
def test_a_part_of_each_head_is_rotated(name: str, rotated: int) -> None:
    assert_equal_to_the_reference(FORESTS[name], NINE, rotated=rotated)


WAYS = {
    "one key head in small blocks": Way(16, 1),
    "all together in small blocks": Way(16, 1 << 20),
    "one key head whole": Way(256, 1),
    "some together, whole": Way(256, 1 << 14),
}


@each_forest
@pytest.mark.parametrize("window", [None, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_gives_the_same(
    forest: list[tuple[int, int]], window: int | None, dtype: torch.dtype, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What scratch memory held before must not matter: here it holds no numbers."""
    for kept in scratch.held.values():
        kept.fill_(float("nan"))
    monkeypatch.setattr(products, "READ_ELEMENTS", 2500)  # one key head or several at a time
    go(way, monkeypatch)
    assert_equal_to_the_reference(forest, Heads(4, 2, SIZE, 0.4, window), dtype)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
def test_every_way_is_near_in_bfloat16(way: Way, product: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's own bfloat16 products, and where they go through float32."""
    go(way, monkeypatch)
    monkeypatch.setattr(products, "product_dtype", lambda x: product)
    for found, wanted in both(FORESTS["three levels"], GROUPED, torch.bfloat16):
        assert (found.double() - wanted.double()).norm() < 0.02 * wanted.double().norm()


@pytest.mark.parametrize(("window", "keys"), [(None, 150), (9, 9 + 16)])
def test_heads_are_computed_together_as_far_as_the_scores_allow(
    window: int | None, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two key heads of three, then the last one."""
    heads = Heads(9, 3, SIZE, 0.4, window)
    way = Way(16, 2 * heads.shared * 16 * keys)
    go(way, monkeypatch)
    (run,) = plan(read_segments(torch.tensor(table(FORESTS["one root"]))), heads, CPU)
    assert isinstance(run.groups, Groups)
    assert [list(_key_head_chunks(one, heads, way)) for one in run.groups.members] == [[slice(0, 2), slice(2, 3)]]
    assert_equal_to_the_reference(FORESTS["one root"], heads)


def test_segments_are_computed_together_as_far_as_the_scores_allow() -> None:
    segments = read_segments(torch.tensor(table([(10, -1)] * 5)))
    (run,) = plan(segments, GROUPED, CPU)
    assert isinstance(run.groups, Groups)
    (group,) = run.groups.members
    whole = attention_ways.together(10)
    assert list(_key_head_chunks(group, GROUPED, whole)) == [slice(0, 10)]  # five segments of two key heads
    fewer = Way(10, 2 * GROUPED.heads * 10 * 10)
    assert list(_key_head_chunks(group, GROUPED, fewer)) == [slice(0, 4), slice(4, 8), slice(8, 10)]


# -- torch's fused attention, for long roots ----------------------------------------------------------------------

MIXED = [(40, -1), (5, -1), (33, -1), (50, -1), (34, -1), (40, 4), (35, 4), (7, -1), (60, -1), (32, -1)]
MIXTURES = {
    "long among short and trees": MIXED,
    "one long root": [(70, -1)],
    "long roots only": [(40, -1), (70, -1)],
    "long at the end": [(20, -1), (30, 0), (64, -1)],
}


@pytest.mark.parametrize("forest", MIXTURES.values(), ids=MIXTURES.keys())
@each_heads
@pytest.mark.parametrize("window", [None, 45])
@pytest.mark.parametrize("rotated", [SIZE, 4])
def test_the_fused_attention_gives_the_same(
    forest: list[tuple[int, int]], heads: Heads, window: int | None, rotated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_from(32, monkeypatch)
    limited = Heads(heads.heads, heads.kv_heads, SIZE, 0.4, window)
    assert_equal_to_the_reference(forest, limited, torch.float32, rotated)


def test_fused_and_grouped_bfloat16_are_both_near(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_from(32, monkeypatch)
    for found, wanted in both(MIXED, GROUPED, torch.bfloat16):
        assert (found.double() - wanted.double()).norm() < 0.02 * wanted.double().norm()


# -- what belongs together and what does not ----------------------------------------------------------------------


@each_forest
@pytest.mark.parametrize("fused_from", [1000, 100])
def test_other_segments_tokens_change_no_bit(
    forest: list[tuple[int, int]], fused_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_from(fused_from, monkeypatch)
    assert_others_change_no_bit(forest, torch.float32, lambda tokens: tokens + 1)


@each_forest
def test_a_segment_gives_no_gradient_beside_and_below_itself(forest: list[tuple[int, int]]) -> None:
    assert_no_gradient_beside_and_below(forest)


@pytest.mark.parametrize("fused_from", [1000, 32])
def test_without_gradients_the_output_is_the_same(fused_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_from(fused_from, monkeypatch)
    segments = table(MIXED)
    qkv, cos, sin, _ = inputs(segments[-1][1], GROUPED, torch.float32)
    trained = attend(qkv.clone().requires_grad_(), cos, sin, segments, GROUPED)
    quiet = attend(qkv, cos, sin, segments, GROUPED)
    assert trained.requires_grad
    assert not quiet.requires_grad
    assert torch.equal(quiet, trained)
    with torch.no_grad():
        assert torch.equal(attend(qkv.clone().requires_grad_(), cos, sin, segments, GROUPED), trained)


def test_training_goes_on_after_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    products._triangles.cache_clear()
    monkeypatch.setattr(scratch, "held", {})
    segments = table([(23, -1)])
    with torch.inference_mode():
        attend(*inputs(23, GROUPED, torch.float64)[:3], segments, GROUPED)
    assert_equal_to_the_reference([(23, -1)], GROUPED)


@pytest.mark.parametrize(
    ("forest", "window", "kv_heads"),
    [
        pytest.param([(5, -1)], None, 1, id="a root"),
        pytest.param([(2, -1), (1, 0), (3, 0)], None, 1, id="a tree"),
        pytest.param([(2, -1), (1, 0), (1, 1), (2, -1)], 2, 2, id="three levels, a window and a root"),
    ],
)
def test_gradcheck(
    forest: list[tuple[int, int]], window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(Way(2, 1), monkeypatch)
    heads = Heads(2, kv_heads, 2, 0.7, window)
    segments = table(forest)
    tokens = segments[-1][1]
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads.total * 2, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(tokens, 1, dtype=torch.float64)
    runs = plan(read_segments(torch.tensor(segments)), heads, CPU)
    cos, sin = angles.cos(), angles.sin()
    assert torch.autograd.gradcheck(lambda x: attention(x.clone(), cos, sin, runs, heads), (qkv,), fast_mode=True)


# -- which way is taken -------------------------------------------------------------------------------------------


def test_only_lengths_between_are_measured_and_long_ones_alike() -> None:
    assert attention_ways.kind(128, CPU, False) == attention_ways.together(128)
    assert [attention_ways.kind(length, CPU, False) for length in (129, 256, 257, 5000)] == [256, 256, 512, 2048]
    assert attention_ways.kind(300, CPU, True) == attention_ways.each(256)  # a window would make other scores
    assert attention_ways.kind(300, torch.device("cuda"), False) == attention_ways.each(256)


def test_a_way_is_preferred_only_if_it_is_clearly_faster() -> None:
    ways = attention_ways.candidates(256)
    usual, other = ways[0], ways[1]
    assert usual == attention_ways.together(128)
    for gain, wanted in ((1.1, usual), (1.3, other)):
        taken = {**dict.fromkeys(ways, 2.0), usual: gain, other: 1.0}
        assert attention_ways.fastest(ways, taken.__getitem__) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ways_are_measured_once(dtype: torch.dtype) -> None:
    products._fastest.cache_clear()
    (run,) = plan(read_segments(torch.tensor(table([(200, -1), (220, -1)]))), NINE, CPU)
    assert isinstance(run.groups, Groups)
    qkv = torch.empty(1, dtype=dtype)
    found = {products._way(group, NINE, qkv) for group in run.groups.members}
    assert len(found) == 1
    assert found <= set(attention_ways.candidates(256))
    assert products._fastest.cache_info().misses == 1


def test_torchs_attention_is_measured_for_long_float32_roots_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ways, "TIMED", 32)
    kernel._fused_is_faster.cache_clear()
    known = [(2049, torch.bfloat16, CPU), (2048, torch.float32, CPU), (1, torch.bfloat16, torch.device("cuda"))]
    assert [kernel.fuses(length, NINE, dtype, device) for length, dtype, device in known] == [False, False, True]
    assert not kernel._fused_is_faster.cache_info().misses
    assert kernel.fuses(2049, NINE, torch.float32, CPU) in (False, True)
    assert kernel._fused_is_faster.cache_info().misses == 1
    kernel._fused_is_faster.cache_clear()
