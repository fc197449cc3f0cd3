"""Base and adapter are one product while a run trains, where the processor multiplies half precision fast."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine_helpers import (
    LORA,
    Pair,
    assert_same,
    make_pair,
    make_rows,
    one_by_one,
    packed,
    phi3_mini,
    phi4_mini,
    qwen2,
    windowed,
)
from phinetune.engine.activation_memory import Level
from phinetune.engine.fast_engine import FastEngine
from phinetune.engine.kept_memory import kept_memory
from phinetune.lora import one_product

ROWS = (40, 31, 70, 2, 33)
CPU = torch.device("cpu")


def weights(pair: Pair) -> list[torch.Tensor]:
    """The weights of all layers that have an adapter."""
    return [one.base_layer.weight for one in pair.fast.modules() if hasattr(one, "base_layer")]  # type: ignore[union-attr]


def rooms(pair: Pair) -> set[int]:
    """For which ranks they have room."""
    return {one_product.room_of(weight) for weight in weights(pair)}


def engine(dropout: bool = False) -> FastEngine:
    return FastEngine("none", True, None, dropout)


@pytest.fixture
def fast_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16 faster than float32."""
    monkeypatch.setattr("phinetune.engine.kernels.matmul.is_slower_than_float32", lambda dtype: False)


def test_a_run_in_bfloat16_has_room_until_its_end(fast_half: None) -> None:
    pair = make_pair(phi3_mini(), torch.bfloat16)
    before = [weight.clone() for weight in weights(pair)]
    engine().set_up(pair.fast, CPU)
    assert rooms(pair) == {LORA["r"]}
    engine().give_back(pair.fast)
    assert rooms(pair) == {0}
    assert all(weight.is_contiguous() for weight in weights(pair))
    assert all(torch.equal(one, other) for one, other in zip(weights(pair), before, strict=True))


@pytest.mark.parametrize("why", ["float32", "dropout", "sharded", "split", "no fast products"])
def test_other_runs_keep_their_weights_as_they_lie(why: str, fast_half: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no fast products":
        monkeypatch.setattr("phinetune.engine.kernels.matmul.is_slower_than_float32", lambda dtype: True)
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    pair = make_pair(qwen2() if why == "split" else phi3_mini(), dtype)
    at = [weight.data_ptr() for weight in weights(pair)]
    engine(dropout=why == "dropout").set_up(pair.fast, CPU, sharded=why == "sharded")
    assert (rooms(pair), [weight.data_ptr() for weight in weights(pair)]) == ({0}, at)


def test_a_weight_that_trains_stays_where_it_is(fast_half: None) -> None:
    pair = make_pair(phi3_mini(), torch.bfloat16)
    weights(pair)[0].requires_grad_()
    engine().set_up(pair.fast, CPU)
    assert [one_product.room_of(weight) > 0 for weight in weights(pair)] == [False] + [True] * 7


@pytest.mark.parametrize("level", list(Level), ids=lambda level: level.name)
@pytest.mark.parametrize("shape", [phi3_mini, phi4_mini, windowed])
def test_a_step_with_room_is_transformers_and_pefts(shape: Any, level: Level) -> None:
    pair, rows = make_pair(shape()), make_rows(ROWS)
    for layer in pair.fast.modules():
        if hasattr(layer, "base_layer"):
            one_product.make_room(layer.base_layer, LORA["r"])  # type: ignore[arg-type]
    pair.fast.get_base_model().model.activation_levels = lambda tokens: [level, level]
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))
    assert rooms(pair) == {LORA["r"]}


@pytest.mark.parametrize("shape", [phi3_mini, phi4_mini, windowed])
def test_in_bfloat16_it_is_no_farther_from_float32(shape: Any, fast_half: None) -> None:
    """And nothing that is left in memory gets into a sum: the widths here are no multiples of a processor's tiles."""
    pair, rows = make_pair(shape()), make_rows(ROWS)
    true = packed(pair.fast, rows)
    pair = make_pair(shape(), torch.bfloat16)
    two = packed(pair.fast, rows)
    engine().set_up(pair.fast, CPU)
    assert rooms(pair) == {LORA["r"]}
    for _ in range(3):
        torch.full((1 << 20,), float("nan"), dtype=torch.bfloat16)
        one = packed(pair.fast, rows)
        assert abs(one.loss - true.loss) <= 1.1 * abs(two.loss - true.loss)
        assert distance(one.gradients, true.gradients) <= 1.1 * distance(two.gradients, true.gradients)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_base_is_not_held_twice(fast_half: None) -> None:
    """The new weights lie in the run's own memory, the old ones lay in C's heap."""
    pair = make_pair(phi3_mini(hidden_size=512, intermediate_size=1536, num_hidden_layers=12), torch.bfloat16)
    held = sum(weight.numel() * weight.element_size() for weight in weights(pair))
    before = resident()
    with kept_memory(CPU):
        engine().set_up(pair.fast, CPU)
        assert rooms(pair) == {LORA["r"]}
        assert resident() - before < held // 4


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The relative distance of all gradients together."""
    apart = sum(float((found[name].double() - value.double()).square().sum()) for name, value in wanted.items())
    return (apart / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5
