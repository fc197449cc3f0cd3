"""The product of few rows is torch's; steps of answers take it, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.engine_helpers import SHAPES, make_pair
from phinetune.engine.continuous.batch import Batch, Row
from phinetune.engine.continuous.requests import AnswerStream, Request
from phinetune.engine.greedy_decode import decode
from phinetune.engine.kernels import few_rows, matmul
from phinetune.engine.kernels.native import operator
from phinetune.engine.kernels.native.operator import chosen
from phinetune.lora.functional import lora_linear

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each product of few rows had, on a machine that chose the native form, whatever this one chose."""
    if not chosen():
        pytest.skip("no native kernels on this machine: the log says why")
    found: list[int] = []

    def counted(name: str) -> Any:
        native = operator.native_form(name)

        def run(x: Tensor, weight: Tensor, out: Tensor) -> None:
            found.append(len(x))
            native(x, weight, out)

        return run

    names = ("few_rows", "few_rows_of_half")
    forms = {**chosen(), **{(name, kind): counted(name) for name in names for kind in operator.DTYPES}}
    monkeypatch.setattr(operator, "chosen", lambda: forms)
    monkeypatch.setattr(matmul, "is_slower_than_float32", lambda dtype: True)
    return found


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.25).to(dtype) for shape in shapes]


def close(found: Tensor, exact: Tensor, times: int = 1) -> None:
    """As near as so many roundings to the dtype of what was found."""
    size = times * (2.0**-8 if found.dtype == torch.bfloat16 else 2e-6)
    torch.testing.assert_close(found.double(), exact.double(), rtol=size, atol=size)


@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 17, 63])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 5), (33, 10), (96, 64), (130, 3)])
def test_it_is_torchs_product(calls: list[int], rows: int, width: int, out: int, dtype: torch.dtype) -> None:
    x, weight = draw(dtype, (rows, width), (out, width))
    with torch.no_grad(), few_rows.in_step():
        close(matmul.linear(x, weight), F.linear(x.double(), weight.double()))
    assert calls == [rows]


@each_dtype
def test_strides_dimensions_and_a_bias(calls: list[int], dtype: torch.dtype) -> None:
    (wide,), (weight,), (bias,) = draw(dtype, (2, 3, 50)), draw(dtype, (9, 60)), draw(dtype, (9,))
    x, weight = wide[..., ::2], weight[:, 5:30]
    with torch.no_grad(), few_rows.in_step():
        found, exact = matmul.linear(x, weight, bias), F.linear(x.double(), weight.double())
    assert calls == [6]
    assert found.shape == (2, 3, 9)
    close(
        found - bias, exact, times=1 if dtype == torch.float32 else 3
    )  # what was rounded is rounded again with the bias


@each_dtype
def test_an_adapter_beside_it(calls: list[int], dtype: torch.dtype) -> None:
    x, seen, weight, bias = draw(dtype, (2, 2, 40), (2, 2, 40), (9, 40), (9,))
    a, b = draw(torch.float32, (4, 40), (9, 4))
    for adapter_input in (None, seen):
        sees = x if adapter_input is None else seen
        exact = (
            F.linear(x.double(), weight.double(), bias.double()) + 0.5 * sees.double() @ a.double().t() @ b.double().t()
        )
        with torch.no_grad(), few_rows.in_step():
            found = lora_linear(x, weight, bias, a, b, 0.5, adapter_input)
        close(
            found, exact, times=1 if dtype == torch.float32 else 4
        )  # A and B, the sum so far and the bias are rounded
    assert calls == [4, 4]


@each_dtype
def test_a_graph_another_layout_and_more_rows_take_torchs_own(calls: list[int], dtype: torch.dtype) -> None:
    x, weight = draw(dtype, (4, 24), (24, 24))
    more = draw(dtype, (few_rows.MOST + 1, 24))[0]
    a, b = draw(dtype, (2, 24), (24, 2))
    with few_rows.in_step():
        assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
        lora_linear(x, weight, None, a, b, 1.0)
    with torch.no_grad():  # scoring
        assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
    with torch.no_grad(), few_rows.in_step():
        assert torch.equal(matmul.linear(x, weight.t()), F.linear(x, weight.t()))
        assert torch.equal(matmul.linear(x[:0], weight), F.linear(x[:0], weight))
        close(matmul.linear(more, weight), F.linear(more.double(), weight.double()))
    assert calls == []


def test_where_half_precision_is_fast_only_the_fewest_rows_are_taken(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "is_slower_than_float32", lambda dtype: False)
    x, weight = draw(torch.bfloat16, (few_rows.MOST_WHERE_FAST + 1, 24), (40, 24))
    with torch.no_grad(), few_rows.in_step():
        matmul.linear(x, weight)
        matmul.linear(x[:-1], weight)
        matmul.linear(x.float(), weight.float())
    assert calls == [few_rows.MOST_WHERE_FAST, few_rows.MOST_WHERE_FAST + 1]


def test_wide_rows_are_fewer_where_half_precision_is_fast() -> None:
    assert [few_rows.most_where_fast(width) for width in (0, 576, 1152, 2048, 3072, 8192)] == [8, 8, 8, 4, 3, 3]


def test_steps_of_answers_take_it(calls: list[int]) -> None:
    """Those of `decode`, with and without an adapter, and those of the answering engine."""
    tuned: Any = make_pair(SHAPES["phi-3-mini"]()).fast.eval()
    decode(tuned.get_base_model(), [[3, 4, 5], [6, 7]], stops=set(), limit=3)
    with_adapter = calls.copy()
    assert set(with_adapter) == {2}
    base = tuned.unload()
    decode(base, [[3, 4, 5], [6, 7]], stops=set(), limit=3)
    assert calls[len(with_adapter) :] == with_adapter
    calls.clear()
    batch = Batch(base, {}, 4, 1 << 30)
    batch.add(Row(Request([3, 4, 5], 3), AnswerStream()))
    while batch.step():
        pass
    assert set(calls) == {1, 3}
