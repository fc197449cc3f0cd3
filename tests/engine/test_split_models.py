"""Llama, Mistral and Qwen2, whose q, k, v and gate, up are apart: each step is that of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.engine_helpers import (
    LIMIT,
    SPLIT,
    assert_equal_to_the_bit,
    assert_same,
    biased_llama,
    keep,
    llama3,
    make_pair,
    make_rows,
    mistral,
    one_by_one,
    packed,
    qwen2,
    windowed_qwen2,
)
from helpers import DEVICE
from phinetune.engine.activation_memory import LayerSizes, Level
from phinetune.engine.choice import has_packed_form, model_class
from phinetune.engine.families import ModelConfig, transformers_class
from phinetune.engine.greedy_decode import decode
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.phi3 import missing_form

Shape = Callable[..., ModelConfig]

ROWS = (5, 33, 70, LIMIT, 2, 64, 130)  # both sides of the window, of longrope's limit and of a block of queries
shapes = pytest.mark.parametrize("shape", SPLIT.values(), ids=SPLIT)
levels = pytest.mark.parametrize("level", [Level.CHEAP, Level.LAYER])


@shapes
def test_a_packed_step_is_that_of_the_rows_one_by_one(shape: Shape) -> None:
    pair, rows = make_pair(shape()), make_rows(ROWS)
    found = packed(pair.fast, rows)
    assert len(found.gradients) == 28  # A and B of seven layers in each of two
    assert_same(found, one_by_one(pair.plain, rows))


@shapes
def test_common_beginnings_are_computed_once(shape: Shape) -> None:
    rows = make_rows((60, 60, 41))
    for row in rows:
        row.input_ids[:20] = rows[0].input_ids[:20]
    pair = make_pair(shape())
    assert_same(packed(pair.fast, rows, share=True), one_by_one(pair.plain, rows))


@shapes
def test_modules_names_and_weights_drawn_are_those_of_transformers(shape: Shape) -> None:
    config, made = shape(), []
    for kind in (transformers_class(config), model_class(config, fast=True)):
        torch.manual_seed(5)
        made.append(kind._from_config(config))
        made[-1].after = torch.rand(2)
    theirs, ours = made
    assert [name for name, _ in theirs.named_modules()] == [name for name, _ in ours.named_modules()]
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert torch.equal(theirs.after, ours.after)
    assert type(ours).__name__ == type(theirs).__name__
    assert has_packed_form(ours)
    assert not has_packed_form(theirs)


@levels
@pytest.mark.parametrize("only", [None, ["k_proj", "down_proj"], ["up_proj"]], ids=["all", "k and down", "up"])
def test_what_is_kept_for_the_backward_changes_nothing(level: Level, only: Any) -> None:
    """An adapter may be on some of the layers side by side, and on none of the others."""
    pair, rows = make_pair(llama3(), target_modules=only or "all-linear"), make_rows(ROWS)
    wanted = packed(pair.fast, rows)
    assert_same(wanted, one_by_one(pair.plain, rows))
    keep(pair.fast, level, level)
    assert_equal_to_the_bit(packed(pair.fast, rows), wanted)


@pytest.mark.parametrize("shape", [biased_llama, mistral])
@pytest.mark.parametrize("level", Level)
def test_the_modules_give_what_the_layer_function_gives(shape: Shape, level: Level) -> None:
    pair, rows = make_pair(shape()), make_rows(ROWS)
    wanted = packed(pair.fast, rows)
    for layer in pair.fast.get_base_model().model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *_: None)  # who listens wants the modules called
    keep(pair.fast, level, level)
    assert_same(packed(pair.fast, rows), wanted)


@pytest.mark.parametrize("shape", [llama3, biased_llama, qwen2])
def test_half_precision_stays_close(shape: Shape) -> None:
    pair, rows = make_pair(shape(), torch.bfloat16), make_rows(ROWS)
    found, wanted = packed(pair.fast, rows), one_by_one(pair.plain, rows)
    assert found.loss == pytest.approx(wanted.loss, rel=5e-3)
    assert found.gradients.keys() == wanted.gradients.keys()


@shapes
def test_greedy_answers_are_those_of_generate(shape: Shape) -> None:
    pair = make_pair(shape()).to(DEVICE)
    prompts = [row.input_ids for row in make_rows((3, 20, LIMIT - 2, 40))]
    core: Any = pair.fast.get_base_model()
    # Past longrope's limit all keys rotate by other factors. Phi-3's `generate` computes them anew; Llama's keeps the
    # old ones in its cache, so here it has none.
    options: dict[str, Any] = {"use_cache": not rope_limit(core.config), "eos_token_id": 2, "do_sample": False}
    found = decode(core, prompts, stops={2}, limit=8)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        made = pair.plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
        assert answer == made[0, len(prompt) :].tolist()


def test_layers_that_attend_in_different_ways_have_no_packed_form() -> None:
    mixed = windowed_qwen2(max_window_layers=1)
    assert missing_form(mixed) == "layer_types that differ"
    assert missing_form(windowed_qwen2()) is None
    assert not has_packed_form(model_class(mixed, fast=True)._from_config(mixed))


def test_under_dropout_each_layer_keeps_an_input_and_a_mask_of_its_own() -> None:
    split, fused = (LayerSizes(32, 64, 32, 64, True, inputs) for inputs in (5, 2))
    assert LayerSizes.of(llama3(), True).inputs == 5
    assert split.kept(Level.KEEP) - fused.kept(Level.KEEP) == 2 * 3 * 32
