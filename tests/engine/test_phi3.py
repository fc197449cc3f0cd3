"""Without packed rows this is transformers' own Phi-3; with them, no work is done that no label needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config
from transformers.models.phi3 import modeling_phi3 as transformers_phi3

from engine.engine_helpers import LIMIT, SHAPES, distance, keep, make_pair, make_rows, phi3_mini, phi4_mini, phi35_mini
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.engine import phi3
from phinetune.engine.activation_memory import Level
from phinetune.engine.choice import has_packed_form
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.packing import pack
from phinetune.engine.phi3 import missing_form

Shape = Callable[..., Phi3Config]

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def both(config: Phi3Config, seed: int = 0, attention: str = "sdpa") -> tuple[Any, Any]:
    """transformers' model and ours, each drawn from the same seed."""
    models = []
    for kind in (transformers_phi3.Phi3ForCausalLM, phi3.Phi3ForCausalLM):
        torch.manual_seed(seed)
        models.append(kind._from_config(config, dtype=torch.float32, attn_implementation=attention).eval())
    return models[0], models[1]


def batch_of(*lengths: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask of shape (rows, longest)."""
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for i, row in enumerate(make_rows(lengths)):
        part = slice(longest - lengths[i], longest) if left else slice(0, lengths[i])
        ids[i, part], mask[i, part] = torch.tensor(row.input_ids), 1
    return ids, mask


# -- the parent ---------------------------------------------------------------------------------------------


@shapes
def test_names_and_weights_drawn_are_those_of_transformers(shape: Shape) -> None:
    theirs, ours = both(shape())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert [n for n, _ in theirs.named_modules()] == [n for n, _ in ours.named_modules()]


@pytest.mark.parametrize("seed", [0, 7])
def test_as_many_random_numbers_are_drawn(seed: int) -> None:
    """What is drawn after the model, an adapter say, is drawn alike."""
    after = []
    for kind in (transformers_phi3.Phi3ForCausalLM, phi3.Phi3ForCausalLM):
        torch.manual_seed(seed)
        kind._from_config(phi3_mini())
        after.append(torch.rand(4))
    assert torch.equal(after[0], after[1])


def test_tied_weights_are_tied() -> None:
    _, ours = both(phi4_mini())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@shapes
def test_a_padded_batch_gets_the_parents_logits(shape: Shape, attention: str) -> None:
    theirs, ours = both(shape(), attention=attention)
    ids, mask = batch_of(5, 40, 33)
    with torch.no_grad():
        wanted, found = (model(input_ids=ids, attention_mask=mask).logits for model in (theirs, ours))
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=1e-4, atol=1e-4)


def test_losses_and_gradients_without_packing_are_the_parents() -> None:
    """The norm has a backward of its own there too. Positional arguments arrive."""
    theirs, ours = both(phi3_mini())
    ids, mask = batch_of(5, 40, 33)
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for model in (theirs, ours):
        out = model(ids, mask, labels=labels, use_cache=False)
        out.loss.backward()
        losses.append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert all(distance(p.grad, gradients[name]) < 1e-5 for name, p in ours.named_parameters())


def test_transformers_gradient_checkpointing_works_without_packing() -> None:
    _, model = both(phi3_mini())
    ids, _ = batch_of(20)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("cache", [True, False])
@shapes
def test_generation_answers_as_the_parent(shape: Shape, cache: bool) -> None:
    """Rows padded at their beginnings; two of them cross longrope's limit on the way."""
    theirs, ours = both(shape())
    ids, mask = batch_of(5, LIMIT - 6, 20, left=True)
    answers = [
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False, use_cache=cache
        )
        for model in (theirs, ours)
    ]
    assert answers[0].shape == (3, LIMIT - 6 + 16)
    assert torch.equal(answers[0], answers[1])


def test_hidden_states_and_attentions_can_be_asked_for() -> None:
    theirs, ours = both(phi3_mini(), attention="eager")
    ids, _ = batch_of(9)
    wanted, found = (model(ids, output_hidden_states=True, output_attentions=True) for model in (theirs, ours))
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    assert len(found.attentions) == 2
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.attentions, wanted.attentions, rtol=1e-4, atol=1e-4)


@shapes
def test_what_is_saved_is_transformers_own(shape: Shape, tmp_path: Path) -> None:
    _, model = both(shape())
    model.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert (tree["architectures"], tree["model_type"]) == (["Phi3ForCausalLM"], "phi3")
    assert "auto_map" not in tree
    ids, _ = batch_of(40)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is transformers_phi3.Phi3ForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    ours = phi3.Phi3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(ours.model.layers[0]) is phi3.Phi3DecoderLayer
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.state_dict().items())


# -- the packed form ----------------------------------------------------------------------------------------


def packed_call(model: PeftModel, *lengths: int) -> Any:
    return model(**pack(make_rows(lengths), rope_limit=rope_limit(model.config)))


@contextmanager
def seen(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """First input and output of every call of a module."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    yield calls
    hook.remove()


def test_the_sums_are_float32_and_only_the_loss_has_a_gradient() -> None:
    out = packed_call(make_pair(phi3_mini(), torch.bfloat16).fast, 20, 9)
    assert {(v.dtype, v.shape) for v in (out.nll, out.correct, out.count)} == {(torch.float32, torch.Size([]))}
    assert (out.nll.requires_grad, out.correct.requires_grad, out.count.requires_grad) == (True, False, False)


@pytest.mark.parametrize("level", Level)
def test_nothing_below_the_lowest_adapter_has_a_gradient(level: Level) -> None:
    core: Any = make_pair(phi3_mini(num_hidden_layers=3), target_modules=["o_proj"], layers_to_transform=[1]).fast
    decoder = core.get_base_model().model
    keep(core, *[level] * 3)
    low_layer, adapted_layer, _ = decoder.layers
    with (
        seen(decoder.embed_tokens) as embedded,
        seen(low_layer) as below,
        seen(adapted_layer.self_attn.qkv_proj) as beside,
        seen(adapted_layer) as adapted,
    ):
        out = packed_call(core, 20, 9)
    ((_, vectors),), ((_, low),), ((_, qkv), *_), ((_, high),) = embedded, below, beside, adapted
    assert [t.requires_grad for t in (vectors, low, qkv, high)] == [False, False, False, True]
    out.nll.backward()


def test_the_last_layer_ends_with_the_labelled_positions() -> None:
    """From its output projection on, only they are computed."""
    core: Any = make_pair(phi3_mini()).fast.get_base_model()
    batch = pack(make_rows([20, 40]))
    tokens, labels = batch["input_ids"].numel(), batch["labels"].numel()
    assert labels < tokens - 2
    first, last = core.model.layers
    with (
        seen(first.self_attn.o_proj) as a,
        seen(last.self_attn.qkv_proj) as b,
        seen(last.self_attn.o_proj) as c,
        seen(last.mlp.gate_up_proj) as d,
        seen(core.model.norm) as e,
    ):
        core(**batch)
    assert [len(calls[0][0]) for calls in (a, b, c, d, e)] == [tokens, tokens, labels, labels, labels]


def test_each_step_asks_for_its_own_levels() -> None:
    model = make_pair(phi3_mini()).fast
    asked: list[int] = []

    def levels(tokens: int) -> list[Level]:
        asked.append(tokens)
        return [Level.KEEP, Level.LAYER]

    core: Any = model.get_base_model()
    core.model.activation_levels = levels
    packed_call(model, 20, 9)
    packed_call(model, 40)
    with torch.no_grad():
        packed_call(model, 33)  # keeps nothing anyway
    assert asked == [29, 40]


@shapes
def test_packed_hidden_states_are_the_parents(shape: Shape) -> None:
    pair, rows = make_pair(shape()), make_rows([5, LIMIT + 8, 33, LIMIT])
    batch = pack(rows, rope_limit=rope_limit(pair.fast.config))
    core: Any = pair.fast.get_base_model()
    with torch.no_grad():
        positions = torch.arange(batch["input_ids"].numel())
        found = core.model.packed(batch["input_ids"][0], batch["position_ids"][0], batch["segments"], positions)
        plain: Any = pair.plain.get_base_model()
        wanted = torch.cat([plain.model(torch.tensor([row.input_ids])).last_hidden_state[0] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_positions_need_not_begin_at_zero() -> None:
    """Rotation is by difference of positions, so a shift changes nothing but through the numbers it is given."""
    model = make_pair(phi3_mini()).fast
    batch = pack(make_rows([20, 9]))
    with torch.no_grad():
        found = [model(**{**batch, "position_ids": batch["position_ids"] + shift}).nll.item() for shift in (0, 50)]
        other = model(**{**batch, "position_ids": batch["position_ids"] * 2}).nll.item()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert other != pytest.approx(found[0], rel=1e-4)


def test_scoring_needs_no_gradient() -> None:
    model = make_pair(phi3_mini()).fast
    with torch.no_grad():
        scored = packed_call(model, 20, 9)
    assert not scored.nll.requires_grad
    assert scored.nll.item() == packed_call(model, 20, 9).nll.item()


def test_a_step_without_labels_sums_to_nothing() -> None:
    model = make_pair(phi3_mini()).fast
    row = make_rows([20])[0]
    out = model(**pack([row._replace(labels=[-100] * 20)]))
    assert (out.nll.item(), out.correct.item(), out.count.item()) == (0.0, 0.0, 0.0)


# -- which models have one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "swish"])
@shapes
def test_the_family_has_a_packed_form(shape: Shape, activation: str) -> None:
    assert missing_form(shape(hidden_act=activation)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act `gelu`"),
        ({"hidden_act": "relu"}, "hidden_act `relu`"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_has_no_packed_form_is_named(changes: dict[str, Any], words: str) -> None:
    assert missing_form(phi3_mini(**changes)) == words


def test_a_rotation_that_grows_with_the_row_has_no_packed_form() -> None:
    """transformers' configuration refuses such a Phi-3 by now; older ones had it."""
    config = SimpleNamespace(hidden_act="silu", attention_dropout=0.0, rope_parameters={"rope_type": "dynamic"})
    assert missing_form(config) == "rope type `dynamic`"


def test_a_model_without_packed_form_is_loaded_as_transformers_own(caplog: pytest.LogCaptureFixture) -> None:
    shape = "random:{layers: 1, hidden: 32, intermediate: 32, heads: 4, vocab: 300, hidden_act: gelu}"
    with caplog.at_level(logging.WARNING):
        loaded = load_base(ModelSection(path=shape))
    assert type(loaded.model) is transformers_phi3.Phi3ForCausalLM
    assert not has_packed_form(loaded.model)
    assert "hidden_act `gelu` has no fast form" in caplog.text


def test_the_longrope_limit_is_the_length_trained_at_first() -> None:
    assert rope_limit(phi3_mini()) is None
    assert rope_limit(phi35_mini()) == rope_limit(phi4_mini()) == LIMIT
