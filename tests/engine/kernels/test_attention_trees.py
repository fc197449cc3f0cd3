"""The native attention equals attention under a dense mask, and its gradient; by blocks of every shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels.attention_cases import (
    FORESTS,
    GROUPED,
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
from phinetune.engine.attention_plan import Heads, Trees, trees_run
from phinetune.engine.kernels import attention_trees
from phinetune.engine.kernels.native.operator import chosen, multiplies, native_form

pytestmark = pytest.mark.skipif(not chosen(), reason="no native kernels on this machine: the log says why")

LARGE = {  # several blocks of queries and of keys, and the odd ends of both
    "a long root": [(515, -1)],
    "a long tree": [(300, -1), (129, 0), (257, 0), (31, 2)],
    "whole blocks": [(256, -1), (128, 0), (128, -1)],
}
SHAPES = {
    "Phi-3 mini": Heads(2, 2, 96, 0.1),
    "Phi-4 mini": Heads(6, 2, 128, 0.09),
    "80 features": Heads(2, 1, 80, 0.11),
    "an odd size": Heads(4, 2, 5, 0.4),
    "all share one": Heads(40, 1, 16, 0.25),
    "more than a block of queries share one": Heads(150, 1, 4, 0.5),
}


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the trial on this machine preferred the other form."""
    for one in (attention_trees._attend, attention_trees._attend_backward):
        monkeypatch.setattr(one, "form", lambda x, one=one: native_form(one.name))


def needs(dtype: torch.dtype) -> None:
    if not multiplies(dtype):
        pytest.skip(f"this processor has no instructions for products in {dtype}: attention runs as torch's")


@each_forest
@each_heads
def test_outputs_and_gradients_are_those_under_a_dense_mask(forest: list[tuple[int, int]], heads: Heads) -> None:
    assert_equal_to_the_reference(forest, heads, torch.float32, native=True)


@pytest.mark.parametrize("forest", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_shape_of_heads_and_blocks(forest: list[tuple[int, int]], heads: Heads, dtype: torch.dtype) -> None:
    assert_near(forest, heads, dtype)


def assert_near(forest: list[tuple[int, int]], heads: Heads, dtype: torch.dtype = torch.bfloat16) -> None:
    needs(dtype)
    most = {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    for found, wanted in both(forest, heads, dtype, native=True):
        assert (found.double() - wanted.double()).norm() < most * wanted.double().norm()


@each_forest
@each_heads
def test_bfloat16_is_near(forest: list[tuple[int, int]], heads: Heads) -> None:
    assert_near(forest, heads)


@pytest.mark.parametrize("forest", [*FORESTS.values(), *LARGE.values()], ids=[*FORESTS, *LARGE])
@pytest.mark.parametrize("window", [1, 2, 9, 64, 100, 130])
def test_a_sliding_window_is_crossed_inside_roots_and_from_branches(forest: list[tuple[int, int]], window: int) -> None:
    assert_equal_to_the_reference(forest, Heads(4, 2, 8, 0.4, window), torch.float32, native=True)


@pytest.mark.parametrize("forest", [*FORESTS.values(), *LARGE.values()], ids=[*FORESTS, *LARGE])
@pytest.mark.parametrize("window", [1, 2, 9, 64, 100, 130])
def test_a_sliding_window_in_bfloat16(forest: list[tuple[int, int]], window: int) -> None:
    assert_near(forest, Heads(4, 2, 8, 0.4, window))


@each_forest
def test_other_segments_tokens_change_no_bit(forest: list[tuple[int, int]]) -> None:
    """Not even if they are no numbers."""
    needs(torch.bfloat16)
    assert_others_change_no_bit(forest, torch.bfloat16, lambda tokens: tokens * float("nan"), native=True)


@each_forest
def test_a_segment_gives_no_gradient_beside_and_below_itself(forest: list[tuple[int, int]]) -> None:
    assert_no_gradient_beside_and_below(forest, native=True)


@pytest.fixture
def many_threads() -> Iterator[None]:
    """So many that each tree's queries are computed in parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(24)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("forest", [*FORESTS.values(), *LARGE.values()], ids=[*FORESTS, *LARGE])
@pytest.mark.parametrize("heads", [GROUPED, Heads(9, 1, 8, 0.4), Heads(2, 1, 8, 0.4, 70)], ids=str)
def test_trees_in_parts(forest: list[tuple[int, int]], heads: Heads) -> None:
    assert_near(forest, heads, torch.float32)


@pytest.mark.parametrize("length", [100, 128, 256])
def test_parted_trees_beside_whole_ones(length: int) -> None:
    """A whole tree takes more memory than a part of a larger one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_near([(300, -1), (length, -1)], Heads(1, 1, 8, 0.4), torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("many_threads")
def test_the_order_in_which_threads_finish_changes_no_bit() -> None:
    segments = table(LARGE["a long tree"])
    qkv, cos, sin, grad = inputs(segments[-1][1], GROUPED, torch.float32)
    found = []
    for _ in range(5):
        leaf = qkv.clone().requires_grad_()
        attend(leaf, cos, sin, segments, GROUPED, native=True).backward(grad)
        found.append(leaf.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("part", ["a query", "a key", "a value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_none_where_it_is_seen(part: str, dtype: torch.dtype) -> None:
    """A loss that is no number stops a run; one that only looks wrong would not."""
    needs(dtype)
    heads, at = Heads(1, 1, 8, 0.4), 50
    segments = table([(100, -1)])
    qkv, cos, sin, _ = inputs(100, heads, dtype)
    first = {"a query": 0, "a key": 8, "a value": 16}[part]
    qkv[at, first : first + 8] = float("nan")
    leaf = qkv.requires_grad_()
    out = attend(leaf, cos, sin, segments, heads, native=True)
    reached = out.isnan().all(dim=1)
    assert reached[at]
    assert reached[at:].all() == (part != "a query")
    assert part == "a value" or not reached[:at].any()  # a value's tile is multiplied by zeros, as plain attention does
    out[at].sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.isfinite().all()


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same() -> None:
    segments = table(FORESTS["two levels"])
    qkv, cos, sin, _ = inputs(segments[-1][1], GROUPED, torch.float32)
    trained = attend(qkv.clone().requires_grad_(), cos, sin, segments, GROUPED, native=True)
    assert trained.requires_grad
    with torch.no_grad():
        assert torch.equal(attend(qkv, cos, sin, segments, GROUPED, native=True), trained)
    assert attention_trees.forward(qkv, torch.tensor(segments), GROUPED, keep=False)[1] is None


def test_one_run_holds_all_segments() -> None:
    rows = torch.tensor(table(FORESTS["three levels"]))
    run = trees_run(rows)
    assert isinstance(run.groups, Trees)
    assert run.length == rows[-1, 1]
    assert run.groups.table is rows


def test_no_tokens_are_no_error() -> None:
    empty = torch.zeros(0, GROUPED.total * GROUPED.size)
    out, _ = attention_trees.forward(empty, torch.zeros(0, 3, dtype=torch.long), GROUPED)
    assert out.shape == (0, 32)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(0, 3, -1), (3, 9, -1)], "not a segment"),
        ([(0, 3, -1)], "do not cover the tokens"),
        ([(0, 3, -1), (4, 5, -1)], "not a segment"),
        ([(0, 3, -1), (3, 4, -1), (4, 5, 0)], "parent is in another tree"),
        ([(0, 3, -1), (3, 5, 1)], "not a segment"),
    ],
    ids=["behind the end", "too few", "a gap", "a parent of another tree", "its own parent"],
)
def test_a_table_that_would_read_elsewhere_is_refused(rows: list[tuple[int, int, int]], told: str) -> None:
    qkv = torch.zeros(5, GROUPED.total * GROUPED.size)
    with pytest.raises(RuntimeError, match=told):
        attention_trees.forward(qkv, torch.tensor(rows), GROUPED)
