"""A layer as one function: where it is taken, where the modules are called instead, and long rows by parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.engine_helpers import (
    Pair,
    assert_equal_to_the_bit,
    assert_same,
    keep,
    make_pair,
    make_rows,
    one_by_one,
    packed,
    phi3_mini,
    phi4_mini,
    windowed,
)
from phinetune.engine import layer_function
from phinetune.engine.activation_memory import Level
from phinetune.engine.packing import pack

ROWS = (40, 31, 70, 2, 33)


def nodes(pair: Pair) -> list[str]:
    """The names of the nodes that a step records."""
    found: dict[Any, None] = {}
    waiting: list[Any] = [pair.fast(**pack(make_rows(ROWS))).nll.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [after for after, _ in node.next_functions]
    return [node.name() for node in found]


def test_a_layer_is_one_node_and_so_is_each_matrix_that_trains() -> None:
    found = nodes(make_pair(phi3_mini()))
    assert found.count("_LayerBackward") == 2
    assert len(found) == 2 + 2 + 16  # loss and last norm, two layers, A and B of eight projections


def _norm_trains(pair: Pair) -> None:
    pair.fast.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_()


def _someone_listens(pair: Pair) -> None:
    pair.fast.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _forward_was_replaced(pair: Pair) -> None:
    norm: Any = pair.fast.get_base_model().model.layers[0].input_layernorm
    norm.forward = norm.forward


def _weight_trains(pair: Pair) -> None:
    pair.fast.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight.requires_grad_()


CASES = [_norm_trains, _someone_listens, _forward_was_replaced, _weight_trains]


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_the_modules_are_called_where_one_function_would_leave_something_out(change: Any) -> None:
    pair, rows = make_pair(phi3_mini()), make_rows(ROWS)
    wanted = packed(pair.fast, rows)
    change(pair)
    assert nodes(pair).count("_LayerBackward") == 1
    found = packed(pair.fast, rows)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["dropout", "dora", "residual dropout", "merged", "autocast"])
def test_no_layer_is_one_function_where_it_can_not_be(how: str) -> None:
    lora = {"dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}.get(how, {})
    pair = make_pair(phi3_mini(resid_pdrop=0.1 if how == "residual dropout" else 0.0), **lora)
    pair.fast.train()
    if how == "merged":
        pair.fast.merge_adapter()
        for parameter in pair.fast.parameters():
            parameter.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert "_LayerBackward" not in nodes(pair)


TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("level", list(Level), ids=lambda level: level.name)
@pytest.mark.parametrize("only", TARGETS)
def test_one_adapted_projection_of_each_layer_gets_the_plain_gradient(only: str, level: Level) -> None:
    """Before the first adapter nothing needs a gradient."""
    pair, rows = make_pair(phi4_mini(), target_modules=[only]), make_rows(ROWS)
    keep(pair.fast, level, level)
    assert nodes(pair).count("_LayerBackward") == 2
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))


@pytest.mark.parametrize("through_float32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_rows_mlp_by_parts_gives_the_same(
    dtype: torch.dtype, through_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.matmul.is_slower_than_float32", lambda dtype: through_float32)
    pair, rows = make_pair(windowed(), dtype), make_rows(ROWS)
    wanted = packed(pair.fast, rows)
    keep(pair.fast, Level.LAYER, Level.LAYER)
    assert_equal_to_the_bit(packed(pair.fast, rows), wanted)
    monkeypatch.setattr(layer_function, "MLP_ROWS", 67)  # of 176 tokens
    loss, gradients = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 3e-2)
    assert_same(packed(pair.fast, rows), wanted, loss, gradients)


def test_a_layers_backward_runs_once() -> None:
    pair = make_pair(phi3_mini())
    out = pair.fast(**pack(make_rows(ROWS)))
    out.nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        out.nll.backward()


def test_what_a_layer_kept_is_let_go_in_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss holds the graph for as long as someone holds the loss."""
    made: list[Any] = []
    original = layer_function._MLPHalf.backward

    def watched(half: Any, grad: torch.Tensor) -> Any:
        made.append(half)
        return original(half, grad)

    monkeypatch.setattr(layer_function._MLPHalf, "backward", watched)
    pair = make_pair(phi3_mini())
    out = pair.fast(**pack(make_rows(ROWS)))
    out.nll.backward()
    assert len(made) == 2
    assert [kept.saved_tensors for half in made for kept in half.kept] == [()] * 8
