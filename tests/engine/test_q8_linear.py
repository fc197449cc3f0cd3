"""A model whose weights lie in q8_0 answers as the model of the numbers that these stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from engine.engine_helpers import SHAPES, SPLIT, phi3_mini
from engine.test_half_linear import adapter_of, greedy
from phinetune.engine.choice import model_class
from phinetune.engine.generate import answer_prompts
from phinetune.engine.kernels import q8
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.q8_linear import Q8Linear, lie_in_q8
from phinetune.errors import ModelError


def models(config: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in q8_0, and one of the numbers that it stands for."""
    torch.manual_seed(0)
    held = model_class(config, fast=True)._from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        held.get_output_embeddings().weight = nn.Parameter(held.get_output_embeddings().weight.clone())  # untied
    whole = copy.deepcopy(held)
    lie_in_q8(held, dtype)
    for name, module in held.named_modules():
        if isinstance(module, Q8Linear):
            whole.get_submodule(name).weight.data = q8.expanded(module.weight, module.scales)
    return held, whole.to(dtype)


@pytest.mark.parametrize("shape", [(1,), (3, 3), (63,), (64,), (130,), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_the_numbers_that_its_weight_stands_for(shape: tuple[int, ...], bias: bool) -> None:
    layer = Q8Linear(nn.Linear(45, 10, bias=bias))
    weight = q8.expanded(layer.weight, layer.scales).double()
    added = None if layer.bias is None else layer.bias.double()
    x = torch.randn(*shape, 90)[..., ::2].requires_grad_()
    found = layer(x)
    exact = x.detach().double().requires_grad_()
    wanted = F.linear(exact, weight, added)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [*SHAPES.values(), *SPLIT.values()], ids=[*SHAPES, *SPLIT])
def test_answers_and_adapters_are_those_of_these_numbers(make: Callable[[], Any]) -> None:
    held, whole = models(make())
    kinds = {type(module) for module in held.modules()}
    assert Q8Linear in kinds
    assert nn.Linear not in kinds
    assert held.dtype == torch.float32  # that of keys, values and adapters
    adapter, prompts = adapter_of(make()), ([3, 4, 5], [7, *range(20, 100)], [8, 9])
    answers = greedy(held, adapter, *prompts)
    assert answers == greedy(whole, adapter, *prompts)
    assert answers[:3] != answers[3:]


def test_answers_of_one_call_are_those_of_these_numbers(tiny: Any) -> None:
    held, whole = models(phi3_mini())
    prompts = [[3, 4, 5], [7, *range(20, 100)], [8, 9]]
    made = [answer_prompts(model, tiny.tokenizer, prompts, max_new_tokens=12) for model in (held, whole)]
    assert made[0] == made[1]


def test_half_precision_has_its_dtype_but_for_the_weights() -> None:
    held, whole = models(phi3_mini(), torch.bfloat16)
    assert {parameter.dtype for parameter in held.parameters()} == {torch.int8, torch.bfloat16}
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        found, wanted = (model(ids).logits.float() for model in (held, whole))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_transformers_generate_under_peft_is_that_of_these_numbers(sample: bool) -> None:
    made = []
    for base in models(phi3_mini()):
        torch.manual_seed(1)
        lora = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = get_peft_model(base, use_fused_layers(lora, base)).eval()
        torch.manual_seed(2)
        made.append(tuned.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=12, do_sample=sample, pad_token_id=0))
    assert torch.equal(*made)


def test_a_tied_head_has_a_weight_of_its_own() -> None:
    config = phi3_mini(tie_word_embeddings=True)
    model = model_class(config, fast=True)._from_config(config, dtype=torch.float32).eval()
    lie_in_q8(model, torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    assert isinstance(head, Q8Linear)
    assert embedding.dtype == torch.float32
    assert all(map(torch.equal, (head.weight, head.scales), q8.quantize(embedding.detach())))


def test_a_merge_that_would_round_is_refused() -> None:
    held, _ = models(phi3_mini())
    tuned: Any = get_peft_model(held, use_fused_layers(LoraConfig(target_modules="all-linear", r=4), held))
    with pytest.raises(ModelError, match="would be rounded"):
        tuned.merge_and_unload()
