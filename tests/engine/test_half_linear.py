"""Weights that lie in bfloat16 give the products of their float32 copies, and a model of them the same answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from engine.engine_helpers import SHAPES, SPLIT, phi3_mini
from phinetune.engine.choice import model_class
from phinetune.engine.continuous.batch import Batch, Row
from phinetune.engine.continuous.low_rank import Adapter, read_updates
from phinetune.engine.continuous.requests import AnswerStream, Request
from phinetune.engine.half_linear import HalfLinear, lie_in_half
from phinetune.engine.kernels import few_rows
from phinetune.engine.kernels.native import operator
from phinetune.engine.kernels.native.operator import chosen
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.errors import ModelError


@pytest.fixture(params=["native", "torch"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each native product had, on a machine that chose it and on one that did not."""
    found: list[int] = []
    if request.param == "native":
        if not chosen():
            pytest.skip("no native kernels on this machine: the log says why")
        native = operator.native_form("few_rows_of_half")

        def run(x: Tensor, weight: Tensor, out: Tensor) -> None:
            found.append(len(x))
            native(x, weight, out)

        forms = {(name, torch.float32): run for name in ("few_rows", "few_rows_of_half")}
        monkeypatch.setattr(operator, "chosen", lambda: forms)
    else:
        monkeypatch.setattr(operator, "chosen", dict)
    yield found
    if request.param == "torch":
        assert found == []


def layer(width: int, out: int, bias: bool = True) -> tuple[HalfLinear, Tensor, Tensor | None]:
    """A layer; its weight and bias in float64."""
    torch.manual_seed(0)
    half = HalfLinear(nn.Linear(width, out, bias=bias, dtype=torch.bfloat16))
    return half, half.weight.double(), None if half.bias is None else half.bias.double()


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 3), (63,), (64,), (130,), (0,)], ids=str)
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 5), (33, 10), (130, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_float32_copy(
    calls: list[int], shape: tuple[int, ...], width: int, out: int, bias: bool
) -> None:
    half, weight, added = layer(width, out, bias)
    x = torch.randn(*shape, 2 * width)[..., ::2]
    with torch.no_grad():
        found = half(x)
    assert (found.dtype, found.shape) == (torch.float32, (*shape, out))
    torch.testing.assert_close(found.double(), F.linear(x.double(), weight, added), rtol=2e-6, atol=2e-6)
    rows = x.numel() // width
    assert calls in ([], [rows] if 0 < rows <= few_rows.MOST else [])


def test_native_products_read_the_weight_as_it_lies(calls: list[int]) -> None:
    half, _, _ = layer(24, 40)
    with torch.no_grad():
        half(torch.randn(few_rows.MOST, 24))
        half(torch.randn(few_rows.MOST + 1, 24))
    assert calls == ([few_rows.MOST] if few_rows.reads_half() else [])


@pytest.mark.parametrize("rows", [3, 70])
def test_a_gradient_goes_through(calls: list[int], rows: int) -> None:
    half, weight, bias = layer(24, 40)
    x = torch.randn(rows, 24, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    half(x).square().sum().backward()
    F.linear(exact, weight, bias).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    assert calls == []


def models(config: Any) -> tuple[Any, Any]:
    """A model whose weights are bfloat16's, lying in it and in float32."""
    torch.manual_seed(0)
    half = model_class(config, fast=True)._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    whole = copy.deepcopy(half).float()
    lie_in_half(half)
    return half, whole


def greedy(model: Any, adapter: Adapter, *prompts: list[int]) -> list[list[int]]:
    """What the answering engine answers: the base first, and then the adapter."""
    batch = Batch(model, {"tuned": adapter}, 8, 1 << 30)
    rows = [Row(Request(prompt, 12, name), AnswerStream()) for name in (None, "tuned") for prompt in prompts]
    for row in rows:
        batch.add(row)
    while batch.step():
        pass
    return [row.tokens for row in rows]


def adapter_of(config: Any) -> Adapter:
    """An adapter whose update is as large as the weights."""
    with torch.device("meta"):
        model = model_class(config, fast=True)._from_config(config)
        tuned: Any = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    weights = {
        name.replace(".default", ""): torch.randn(tensor.shape) / 3
        for name, tensor in tuned.named_parameters()
        if "lora_" in name
    }
    return read_updates(tuned.eval(), weights)


@pytest.mark.parametrize("make", [*SHAPES.values(), *SPLIT.values()], ids=[*SHAPES, *SPLIT])
def test_answers_and_adapters_are_those_of_float32(make: Callable[[], Any]) -> None:
    half, whole = models(make())
    linear = {f"{name}.weight" for name, module in whole.named_modules() if type(module) is nn.Linear}
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == linear
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    assert half.dtype == torch.float32  # that of keys, values and adapters
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, half.get_parameter(name).float())
    adapter, prompts = adapter_of(make()), ([3, 4, 5], [7, *range(20, 100)], [8, 9])
    answers = greedy(half, adapter, *prompts)
    assert answers == greedy(whole, adapter, *prompts)
    assert answers[:3] != answers[3:]


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_transformers_generate_under_peft_is_that_of_float32(sample: bool) -> None:
    made = []
    for base in models(phi3_mini()):
        torch.manual_seed(1)
        lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = get_peft_model(base, use_fused_layers(lora, base)).eval()
        assert {p.dtype for name, p in tuned.named_parameters() if "lora_" in name} == {torch.float32}
        torch.manual_seed(2)
        made.append(tuned.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=12, do_sample=sample, pad_token_id=0))
    assert torch.equal(*made)


def test_a_tied_head_has_a_weight_of_its_own() -> None:
    half, _ = models(phi3_mini(tie_word_embeddings=True))
    head, embedding = half.get_output_embeddings().weight, half.get_input_embeddings().weight
    assert (head.dtype, embedding.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(head.float(), embedding)


def test_a_merge_that_would_round_is_refused() -> None:
    half, _ = models(phi3_mini())
    tuned: Any = get_peft_model(half, use_fused_layers(LoraConfig(target_modules="all-linear", r=4), half))
    with pytest.raises(ModelError, match="would be rounded"):
        tuned.merge_and_unload()
