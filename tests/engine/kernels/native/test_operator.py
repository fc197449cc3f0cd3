"""Each native operator gives what torch's form gives, at any width and with any strides, and rounds no worse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from phinetune.engine.kernels import attention_trees, cross_entropy, few_rows, low_rank, norm, rotary, swiglu
from phinetune.engine.kernels.native import operator
from phinetune.engine.kernels.native.operator import Operator, chosen, rows_of

WIDTHS = [1, 7, 16, 33, 130, 3072]
ROWS = [0, 1, 5]
each_size = pytest.mark.parametrize(("rows", "width"), [*itertools.product(ROWS, WIDTHS)], ids=str)
each_dtype = pytest.mark.parametrize("dtype", operator.DTYPES, ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _library() -> None:
    if not chosen():
        pytest.skip("no native kernels on this machine: the log says why")


def wide(rows: int, width: int, seed: int, more: int = 3) -> Tensor:
    """Normal float64 numbers, shape (rows, width), in rows that lie apart in memory, as in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width + more, generator=generator, dtype=torch.float64).bfloat16().double()[:, :width]


def cast(argument: Any, dtype: torch.dtype, between: float = 0.0) -> Any:
    """A copy of an argument with the same strides, its float64 numbers in another dtype.

    Args:
        between: what the memory between its rows holds. torch's product of bfloat16 on AMX multiplies what lies there
            by zero, so it must be a number for torch's forms.
    """
    if not isinstance(argument, Tensor) or argument.dtype != torch.float64:
        return argument.clone() if isinstance(argument, Tensor) else argument
    size = torch.empty_strided(argument.shape, argument.stride()).untyped_storage().nbytes() // 4
    made = torch.full((size,), between, dtype=dtype).as_strided(argument.shape, argument.stride())
    return made.copy_(argument)


def compare(
    op: Operator, arguments: tuple[Any, ...], written: tuple[int, ...], dtype: torch.dtype, formula: Any = None
) -> None:
    """Run the native form, torch's in the same dtype, and a formula (default: torch's form) in float64: the truth."""
    native = operator.native_form(op.name)  # must not read between rows
    forms = (native, dtype), (op.by_torch, dtype), (formula or op.by_torch, torch.float64)
    found, theirs, exact = [], [], []
    for results, (run, kind) in zip((found, theirs, exact), forms, strict=True):
        given = [cast(argument, kind, torch.nan if run is native else 0.0) for argument in arguments]
        run(*given)
        results += [given[i].double() for i in written]
        for i, argument in enumerate(arguments):  # what is not written to stays as it was
            if isinstance(argument, Tensor) and i not in written:
                assert torch.equal(given[i].double(), argument.double())
    if dtype == torch.float32:
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=2e-6)
    for ours, plain, wanted in zip(found, theirs, exact, strict=True):
        assert (ours - wanted).norm() <= 1.02 * (plain - wanted).norm() + 1e-5 * wanted.norm()


def norm_formula(x: Tensor, residual: Any, weight: Tensor, eps: float, out: Tensor, scale: Tensor, total: Any) -> None:
    if residual is not None:
        x = torch.add(x, residual, out=total)
    scale.copy_((x.square().mean(-1) + eps).rsqrt())
    torch.mul(x * (x.square().mean(-1, keepdim=True) + eps).rsqrt(), weight, out=out)


def slope_formula(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Any, dx: Tensor) -> None:
    by, g = scale.double()[:, None], grad * weight
    dx.copy_(by * (g - x * by.square() * (g * x).mean(-1, keepdim=True)) + (0 if beside is None else beside))


@each_dtype
@pytest.mark.parametrize(
    "run", [attention_trees._attend, attention_trees._attend_backward], ids=["forward", "backward"]
)
def test_products_are_asked_for_where_the_processor_has_them(run: Operator, dtype: torch.dtype) -> None:
    """A product without its instructions is an error, after lines about it in C++ that no user should have to read."""
    found = operator._tried(run, dtype)
    assert (found == operator.UNABLE) == (not operator.multiplies(dtype))
    assert found == operator.UNABLE or found["agrees"]
    if found == operator.UNABLE:
        with pytest.raises(RuntimeError, match="Brgemm"):
            operator.trial(run, dtype)


@each_dtype
@each_size
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "after a sum"])
def test_rms_norm(rows: int, width: int, adds: bool, dtype: torch.dtype) -> None:
    x, residual, out, total = (wide(rows, width, seed) for seed in range(4))
    weight, scale = wide(1, width, 4)[0].float(), torch.zeros(rows)
    more = (residual, total) if adds else (None, None)
    written = (4, 5, 6) if adds else (4, 5)
    compare(norm._forward, (x, more[0], weight, 1e-5, out, scale, more[1]), written, dtype, norm_formula)


@each_dtype
@each_size
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "beside another gradient"])
def test_rms_norm_backward(rows: int, width: int, adds: bool, dtype: torch.dtype) -> None:
    grad, x, beside, dx = (wide(rows, width, seed) for seed in range(4))
    weight, scale = wide(1, width, 4)[0].float(), torch.rand(rows) + 0.5
    compare(norm._backward, (grad, x, weight, scale, beside if adds else None, dx), (5,), dtype, slope_formula)


@each_dtype
@each_size
def test_swiglu_and_its_backward(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up, grad, d_gate_up = wide(rows, 2 * width, 0), wide(rows, width, 1), wide(rows, 2 * width, 2)
    compare(swiglu._forward, (2 * gate_up, wide(rows, width, 3)), (1,), dtype)
    compare(swiglu._backward, (grad, 2 * gate_up, d_gate_up), (2,), dtype)


@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 5, 9, 63])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 4), (33, 3), (130, 8), (3072, 5)])
def test_few_rows(rows: int, width: int, out: int, dtype: torch.dtype) -> None:
    x, weight = wide(rows, width, 0), (wide(out, width, 1) / width**0.5).bfloat16().double()
    compare(few_rows._few_rows, (x, weight, wide(rows, out, 2)), (2,), dtype)


@pytest.mark.parametrize("rows", [0, 1, 5, 63])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (33, 3), (130, 8), (3072, 5)])
def test_few_rows_of_half(rows: int, width: int, out: int) -> None:
    x, weight = wide(rows, width, 0), (wide(out, width, 1) / width**0.5).bfloat16()
    compare(few_rows._few_rows_of_half, (x, weight, wide(rows, out, 2)), (2,), torch.float32)


@each_dtype
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 4), (33, 130), (130, 3072)])
def test_updates_of_adapters_with_other_ranks_tokens_and_none(width: int, out: int, dtype: torch.dtype) -> None:
    """Token 2 has no adapter, the last adapter has no token."""
    ranks, starts, stops = [1, 5, 16, 3], [0, 3, 4, 7], [2, 4, 7, 7]
    a = [(wide(rank, width, rank) / width**0.5).bfloat16().double() for rank in ranks]
    b_t, scalings = [wide(rank, out, rank + 20) for rank in ranks], [0.5, 1.0, 2.0, 1.0]
    made = []
    for run, kind in ((operator.native_form("add_low_rank_"), dtype), (low_rank._by_torch, torch.float64)):
        given = [cast(wide(8, size, seed), kind) for size, seed in ((out, 50), (width, 51))]
        matrices = [[cast(one, kind) for one in side] for side in (a, b_t)]
        run(*given, *matrices, scalings, starts, stops)
        made.append(given[0].double())
    size = 3e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(made[0], made[1], rtol=size, atol=size)
    assert torch.equal(made[0][[2, 7]], cast(wide(8, out, 50), dtype).double()[[2, 7]])


@each_dtype
@pytest.mark.parametrize("half", [1, 4, 7, 16, 24, 48])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotation_in_a_wider_tensor(rows: int, half: int, sign: float, dtype: torch.dtype) -> None:
    size = 2 * half + 5  # the last features of a head are not rotated
    qkv = wide(rows, 4 * size, 0)
    states = qkv.as_strided((rows, 3, size), (qkv.stride(0), size, 1))
    compare(rotary._rotate_, (states, wide(rows, half, 1), wide(rows, half, 2), sign), (0,), dtype)


@each_dtype
@each_size
@pytest.mark.parametrize("learns", [False, True], ids=["scores", "gradient"])
def test_cross_entropy(rows: int, width: int, learns: bool, dtype: torch.dtype) -> None:
    logits = 4 * wide(rows, width, 0)
    labels = logits.argmax(-1) if width > 1 and rows else torch.zeros(rows, dtype=torch.int64)
    labels[::2] = width // 2  # some are the first choice, some are not
    weights = torch.arange(rows) - 1.5 if learns else None
    arguments = (logits, labels, weights, torch.zeros(rows), torch.zeros(rows))
    compare(cross_entropy._cross_entropy_, arguments, (0, 3, 4) if learns else (3, 4), dtype)


@each_dtype
@each_size
def test_spread(rows: int, width: int, dtype: torch.dtype) -> None:
    logits = 4 * wide(rows, width, 0)
    labels = torch.full((rows,), width // 2)
    log_probs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0].float()
    compare(cross_entropy._spread, (logits, labels, log_probs, torch.zeros(rows), torch.zeros(rows)), (3, 4), dtype)


def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_probs, first = torch.empty(2, len(labels)).unbind()
    operator.native_form("cross_entropy_")(logits, labels, None, log_probs, first)
    return log_probs, first


@each_dtype
def test_of_equal_logits_the_first_is_the_choice(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 5000, dtype=dtype)
    logits[:, [70, 3000]] = 1.0
    assert score(logits, torch.tensor([70, 3000, 0, 4999]))[1].tolist() == [1, 0, 0, 0]


def test_logits_of_minus_infinity_have_no_share_and_rows_grow_in_any_order() -> None:
    """A block of them may come first, or hold a whole row; and the maximum may rise from block to block."""
    logits = torch.linspace(-200, 200, 9000).repeat(3, 1)
    logits[0, :5000] = float("-inf")
    logits[1] = logits[1].flip(0)
    logits[2] = float("-inf")
    wanted = logits.double().log_softmax(-1)
    labels = torch.tensor([8000, 20, 0])
    found, first = score(logits, labels)
    torch.testing.assert_close(found[:2].double(), wanted[[0, 1], labels[:2]], rtol=1e-6, atol=1e-6)
    assert found[2].isnan()
    assert first.tolist()[:2] == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told(bad: float) -> None:
    logits = torch.randn(3, 5000)
    logits[:, 4000] = bad
    assert not score(logits, torch.tensor([0, 4000, 4999]))[0].isfinite().any()
    gate_up = torch.tensor([[bad, 1.0, 2.0, 1.0]])
    out = swiglu.swiglu(gate_up)
    assert not out[0, 0].isfinite()
    x = torch.tensor([[bad, 1.0]])
    assert not norm.rms_norm(x, torch.ones(2), 1e-5)[0, 0].isfinite()


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_without_a_logit_is_refused(label: int) -> None:
    with pytest.raises(RuntimeError, match="has no logit"):
        score(torch.zeros(2, 5), torch.tensor([0, label]))


def test_what_would_be_read_past_its_end_is_refused() -> None:
    x, weight, scale = torch.zeros(4, 8), torch.ones(8), torch.empty(4)
    run = operator.native_form("rms_norm")
    run(x, None, weight, 1e-5, torch.empty(4, 8), scale, None)
    for wrong in (torch.empty(4, 7), torch.empty(3, 8), torch.empty(8, 4).t(), torch.empty(4, 8).double(), scale):
        with pytest.raises(RuntimeError, match="phinetune: "):
            run(x, None, weight, 1e-5, wrong, scale, None)
    with pytest.raises(RuntimeError, match="phinetune: "):
        run(x, x, weight, 1e-5, torch.empty(4, 8), scale, None)
    product = operator.native_form("few_rows")
    for wrong in (torch.empty(4, 9), torch.empty(4, 8).bfloat16(), torch.empty(8, 4).t()):
        with pytest.raises(RuntimeError, match="phinetune: "):
            product(x, torch.empty(8, 8), wrong)
    add, a, b_t = operator.native_form("add_low_rank_"), torch.empty(2, 8), torch.empty(2, 9)
    add(torch.empty(4, 9), x, [a], [b_t], [1.0], [0], [4])
    for others in (
        ([a], [b_t], [1.0], [0], [5]),
        ([a], [b_t], [1.0], [-1], [4]),
        ([a], [a], [1.0], [0], [4]),
        ([a], [b_t], [], [0], [4]),
    ):
        with pytest.raises(RuntimeError, match="phinetune: "):
            add(torch.empty(4, 9), x, *others)
    with pytest.raises(RuntimeError, match="phinetune: "):
        run(x, None, weight, 1e-5, torch.empty(4, 8), torch.empty(3), None)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_shared_out_among_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    x, out, weight = wide(300, 700, 0), wide(300, 700, 1), wide(1, 700, 2)[0].float()
    compare(norm._forward, (x, None, weight, 1e-5, out, torch.zeros(300), None), (4, 5), torch.float32, norm_formula)


def test_float64_and_other_devices_take_torchs_form() -> None:
    form = norm._forward.form
    assert form(torch.zeros(1)) is operator.native_form("rms_norm")
    for x in (torch.zeros(1).double(), torch.zeros(1).half(), torch.zeros(1, device="meta")):
        assert form(x) is norm._forward.by_torch


def test_rows_with_gaps_are_copied_and_others_are_not() -> None:
    x = torch.randn(2, 3, 8)
    assert rows_of(x).data_ptr() == x.data_ptr()
    assert rows_of(x[0, :, 2:6]).data_ptr() == x[0, :, 2:6].data_ptr()
    turned = x[0].t()
    assert torch.equal(rows_of(turned), turned)
    assert rows_of(turned).stride(-1) == 1


def test_a_form_that_gives_something_else_or_takes_longer_is_left_aside() -> None:
    """The trial runs the native form beside a form of ours: one that is wrong, and one that does nothing."""

    def wrong(gate_up: Tensor, out: Tensor) -> None:
        swiglu._forward.by_torch(gate_up, out)
        out += 1

    def quick(gate_up: Tensor, out: Tensor) -> None:
        out.untyped_storage()

    right = swiglu._forward
    try:
        seconds = operator.trial(Operator("swiglu", wrong, right.sample), torch.float32)
        assert not seconds["agrees"]
        assert not seconds["native_is_faster"]

        def sample(kind: torch.dtype) -> tuple[Any, ...]:  # zeros, so that nothing need be done
            return torch.zeros(64, 2048, dtype=kind), torch.zeros(64, 1024, dtype=kind)

        seconds = operator.trial(Operator("swiglu", quick, sample), torch.float32)
        assert seconds["agrees"]
        assert not seconds["native_is_faster"]
    finally:
        operator._all["swiglu"] = right


def test_a_form_that_can_not_run_here_is_left_aside_and_the_others_stay() -> None:
    """As the products of attention on a processor without their instruction set."""
    right = swiglu._forward
    try:
        found = operator._tried(
            Operator("swiglu", right.by_torch, lambda kind: (torch.zeros(2, 3), torch.zeros(2))), torch.float32
        )
    finally:
        operator._all["swiglu"] = right
    assert not found["native_is_faster"]
    assert found["failed"]
