"""A packed step is plain transformers' and PEFT's step over the same rows: loss, first choices, every gradient."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config

from engine.engine_helpers import (
    LIMIT,
    SHAPES,
    Pair,
    Step,
    assert_equal_to_the_bit,
    assert_same,
    distance,
    keep,
    make_pair,
    make_rows,
    one_by_one,
    packed,
    packed_step,
    padded,
    phi3_mini,
    phi4_mini,
    phi35_mini,
    small_config,
    windowed,
    with_prompt,
)
from phinetune.engine.activation_memory import LayerSizes, Level
from phinetune.engine.examples import Encoded
from phinetune.engine.kernels import attention
from phinetune.engine.kernels.attention import FUSED_FROM
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.packing import pack

Shape = Callable[..., Phi3Config]

# Around a block of 64 queries, both sides of longrope's limit and of the window; alike ones are padded together.
LENGTHS = {
    "short": (5, 31, 20, 2, LIMIT),
    "long": (40, 70, 33, 130, 65),
    "mixed": (5, 33, 70, LIMIT, 2, 64, 66, 31, 130, 90),
}
SOME = LENGTHS["mixed"][:7]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True"),  # merging is none of this file's matter
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True"),
]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


# -- shapes -------------------------------------------------------------------------------------------------


@lengths
@shapes
def test_a_packed_step_is_that_of_the_rows_one_by_one(shape: Shape, lengths: Sequence[int]) -> None:
    pair, rows = make_pair(shape()), make_rows(lengths)
    found = packed(pair.fast, rows)
    assert len(found.gradients) == 16  # A and B of four layers in each of two
    assert_same(found, one_by_one(pair.plain, rows))


@lengths
@shapes
def test_a_packed_step_is_that_of_a_padded_batch(shape: Shape, lengths: Sequence[int]) -> None:
    pair, rows = make_pair(shape()), make_rows(lengths)
    found, batch = packed(pair.fast, rows), padded(pair.plain, rows)
    if rope_limit(pair.plain.config) and min(lengths) <= LIMIT < max(lengths):
        # transformers rotates a whole batch as its longest row, so a short row depends on its neighbours there.
        assert found.loss != pytest.approx(batch.loss, rel=1e-3)
    else:
        assert_same(found, batch)


def test_the_two_sides_of_longropes_limit_rotate_unlike() -> None:
    """So that a wrong set of factors would show in every test here."""
    short, long = make_rows([LIMIT]), make_rows([LIMIT + 1])
    pair = make_pair(phi35_mini())
    found = [packed(pair.fast, rows).loss for rows in (short, long)]
    for key in ("short_factor", "long_factor"):
        config = phi35_mini()
        config.rope_parameters[key] = [1.0] * 4
        pair = make_pair(config)
        changed = [packed(pair.fast, rows).loss for rows in (short, long)]
        assert [new != old for new, old in zip(changed, found, strict=True)] == [
            key == "short_factor",
            key == "long_factor",
        ]


@pytest.mark.parametrize("shape", [phi3_mini, windowed])
@pytest.mark.parametrize("fused", [False, True])
def test_a_row_long_enough_for_torchs_own_attention_is_the_same(
    shape: Shape, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_fused_is_faster", lambda heads: fused)
    rows = make_rows([20, FUSED_FROM + 1, 70, FUSED_FROM + 40])
    pair = make_pair(shape())
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))


@pytest.mark.parametrize("width", [8, 24])
def test_heads_need_not_divide_the_width(width: int) -> None:
    config = small_config(head_dim=width, num_key_value_heads=1)
    pair, rows = make_pair(config), make_rows(SOME)
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))


def test_first_choices_are_counted() -> None:
    """Random labels are hardly ever the first choice; here every second label is."""
    pair, rows = make_pair(phi3_mini()), make_rows(SOME)
    chosen = []
    for row in rows:
        with torch.no_grad():
            best = pair.plain(torch.tensor([row.input_ids])).logits[0].argmax(-1).tolist()
        labels = [best[i - 1] if i % 2 else label for i, label in enumerate(row.labels)]
        chosen.append(Encoded(row.input_ids, labels))
    found = packed(pair.fast, chosen)
    assert found.correct > found.count / 3
    assert_same(found, one_by_one(pair.plain, chosen))


@pytest.mark.parametrize("labelled", [[0], [8], [0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 4]])
def test_any_tokens_may_be_the_labelled_ones(labelled: list[int]) -> None:
    """Nothing predicts the first token, and nothing is predicted at the last one."""
    pair = make_pair(phi3_mini())
    first, second = make_rows([9, 30])
    rows = [Encoded(first.input_ids, [first.input_ids[i] if i in labelled else -100 for i in range(9)]), second]
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))


# -- adapters -----------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1},
    "rank above the width": {"r": 64},
    "rslora": {"r": 16, "use_rslora": True},
    "rank and alpha by layer": {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "bias of the adapter": {"lora_bias": True},
    "all biases train, and there are none": {"bias": "all"},
    "only qkv": {"target_modules": ["qkv_proj"]},
    "only the last projection": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "only the second layer": {"target_modules": ["qkv_proj", "gate_up_proj"], "layers_to_transform": [1]},
    "only the first layer": {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [0]},
    "embedding": {"target_modules": ".*(embed_tokens|qkv_proj)"},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}
SAVED = {
    "head": ["lm_head"],
    "norm": ["input_layernorm"],
    "all norms": ["input_layernorm", "post_attention_layernorm", "norm"],
    "embedding": ["embed_tokens"],
}
adapters = pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)


@adapters
def test_an_adapter_of_any_kind_gets_peft_gradients(lora: dict[str, Any]) -> None:
    pair, rows = make_pair(phi3_mini(), **lora), make_rows(SOME)
    assert_same(packed(pair.fast, rows), one_by_one(pair.plain, rows))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", SAVED.values(), ids=SAVED)
def test_modules_trained_whole_get_peft_gradients(modules: list[str], tied: bool) -> None:
    config = phi3_mini(tie_word_embeddings=tied)
    pair, rows = make_pair(config, modules_to_save=modules), make_rows(SOME)
    found = packed(pair.fast, rows)
    assert all(any(f"{name}.modules_to_save" in key for key in found.gradients) for name in modules)
    assert_same(found, one_by_one(pair.plain, rows))


def test_layers_below_the_lowest_adapter_get_no_gradient() -> None:
    pair = make_pair(phi3_mini(), target_modules=["qkv_proj", "down_proj"], layers_to_transform=[1])
    found = packed(pair.fast, make_rows(SOME)).gradients
    assert {name.split(".")[4] for name in found} == {"1"}
    assert len(found) == 4


def test_an_adapter_switched_off_leaves_the_base() -> None:
    pair, rows = make_pair(phi3_mini()), make_rows(SOME)
    losses = []
    for model, step in ((pair.fast, packed), (pair.plain, one_by_one)):
        with model.disable_adapter():
            for parameter in model.parameters():
                parameter.requires_grad_()
            losses.append(step(model, rows).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(packed(pair.fast, rows).loss, rel=1e-3)


# -- activation memory --------------------------------------------------------------------------------------

LEVELS = [
    (Level.CHEAP, Level.CHEAP),
    (Level.LAYER, Level.LAYER),
    (Level.LAYER, Level.CHEAP),
    (Level.CHEAP, Level.KEEP),
    (Level.KEEP, Level.LAYER),
]
levels = pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: "-".join(level.name for level in levels))


@levels
@shapes
def test_what_is_recomputed_is_the_same_to_the_bit(shape: Shape, levels: tuple[Level, ...]) -> None:
    pair, rows = make_pair(shape()), make_rows(LENGTHS["mixed"])
    wanted = packed(pair.fast, rows)
    keep(pair.fast, *levels)
    assert_equal_to_the_bit(packed(pair.fast, rows), wanted)


@levels
@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}, ADAPTERS["only qkv"]],
    ids=["dora", "norms", "qkv"],
)
def test_adapters_of_other_kinds_are_recomputed_to_the_bit(lora: dict[str, Any], levels: tuple[Level, ...]) -> None:
    pair, rows = make_pair(phi3_mini(), **lora), make_rows(SOME)
    wanted = packed(pair.fast, rows)
    keep(pair.fast, *levels)
    assert_equal_to_the_bit(packed(pair.fast, rows), wanted)


@levels
def test_bfloat16_is_recomputed_to_the_bit(levels: tuple[Level, ...]) -> None:
    pair, rows = make_pair(windowed(), torch.bfloat16), make_rows(SOME)
    wanted = packed(pair.fast, rows)
    keep(pair.fast, *levels)
    assert_equal_to_the_bit(packed(pair.fast, rows), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_keeps_what_the_budget_counts_with(dropout: float) -> None:
    """Measured between two layers and four; the budget leaves out what is a number or two a token, and the random
    state of a layer recomputed, and counts a mask as if it were as wide as what it is for.
    """
    batch = using_all_positions(pack(make_rows(LENGTHS["long"])))
    tokens = batch["input_ids"].numel()
    for level in Level:
        held = []
        for layers in (2, 4):
            pair = make_pair(small_config(num_key_value_heads=2, num_hidden_layers=layers), r=1, lora_dropout=dropout)
            pair.fast.train()
            keep(pair.fast, *[level] * layers)
            held.append(held_after_forward(pair, batch))
        counted = LayerSizes.of(pair.fast.config, dropout > 0).kept(level)
        found = (held[1] - held[0]) / 2 / (4 * tokens)
        assert counted * (0.9 if dropout else 0.99) < found < counted + 10


def held_after_forward(pair: Pair, batch: dict[str, Tensor]) -> int:
    """Bytes that a step allocates and has not freed when its backward begins."""
    pair.fast(**batch)  # what is made once, such as masks
    gc.disable()  # what other tests left in cycles must not be freed meanwhile
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = pair.fast(**batch)
    finally:
        gc.enable()
    assert out.nll.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


# -- dropout ------------------------------------------------------------------------------------------------


@levels
@pytest.mark.parametrize("residual", [0.0, 0.2])
def test_dropout_is_recomputed_with_the_same_masks(levels: tuple[Level, ...], residual: float) -> None:
    pair, rows = make_pair(phi3_mini(resid_pdrop=residual), lora_dropout=0.3), make_rows(SOME)
    pair.fast.train()

    def step(seed: int, *kept: Level) -> Step:
        keep(pair.fast, *kept)
        torch.manual_seed(seed)
        return packed(pair.fast, rows)

    wanted = step(3)
    assert step(4).loss != wanted.loss
    assert_equal_to_the_bit(step(3, *levels), wanted)


@pytest.mark.parametrize("residual", [0.0, 0.2])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_one_rows_dropout_masks_are_those_of_peft(lora: dict[str, Any], residual: float) -> None:
    """Both draw the same masks in the same order where the engine uses every position's output."""
    pair, (row,) = make_pair(phi3_mini(resid_pdrop=residual), lora_dropout=0.3, **lora), make_rows([40])
    pair.plain.train()
    pair.fast.train()
    torch.manual_seed(5)
    wanted = one_by_one(pair.plain, [row])
    torch.manual_seed(5)
    found = packed_step(pair.fast, using_all_positions(pack([row])))
    assert_same(found, wanted)
    torch.manual_seed(6)
    assert packed_step(pair.fast, using_all_positions(pack([row]))).loss != pytest.approx(wanted.loss, rel=1e-4)


def using_all_positions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same step with a label at every position; those added weigh nothing."""
    at = batch["predicts"]
    tokens = batch["input_ids"].shape[1]
    labels = torch.zeros(tokens, dtype=torch.long).index_copy(0, at, batch["labels"])
    weights = torch.zeros(tokens).index_copy(0, at, batch["weights"])
    return {**batch, "predicts": torch.arange(tokens), "labels": labels, "weights": weights}


# -- shared beginnings --------------------------------------------------------------------------------------


def family(seed: int = 0) -> list[Encoded]:
    """Rows of one system prompt, most of one of two topics under it; one twice, one a beginning of another, one alone.

    Some are shorter than longrope's limit, and two of these branch at their prompt's end.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=generator).tolist()

    system, topics, twice = tokens(20), (tokens(18), tokens(17)), tokens(30)
    ids = [
        system + topics[0] + tokens(9),
        system + topics[1] + tokens(3),
        system + tokens(5),
        system + topics[0] + twice,
        tokens(33),
        system + topics[1] + tokens(40),
        system + topics[0] + twice,
        system + tokens(12),
        system + topics[1],
    ]
    return [Encoded(row, with_prompt(row)) for row in ids]


def depths(batch: dict[str, Tensor]) -> list[int]:
    """How many segments stand above each."""
    found: list[int] = []
    for _, _, parent in batch["segments"].tolist():
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


@shapes
def test_shared_beginnings_change_nothing(shape: Shape) -> None:
    pair, rows = make_pair(shape()), family()
    limit = rope_limit(pair.plain.config)
    batches = {share: pack(rows, share=share, rope_limit=limit) for share in (True, False)}
    assert max(depths(batches[True])) == 2
    assert batches[True]["input_ids"].numel() < 0.7 * batches[False]["input_ids"].numel()
    assert batches[True]["row_tokens"] == batches[False]["row_tokens"]
    found, apart = (packed_step(pair.fast, batches[share]) for share in (True, False))
    assert_same(found, apart)
    assert_same(found, one_by_one(pair.plain, rows))


@levels
@shapes
def test_shared_beginnings_are_recomputed_to_the_bit(shape: Shape, levels: tuple[Level, ...]) -> None:
    pair, rows = make_pair(shape()), family()
    wanted = packed(pair.fast, rows, share=True)
    keep(pair.fast, *levels)
    assert_equal_to_the_bit(packed(pair.fast, rows, share=True), wanted)


@pytest.mark.parametrize("long", [300, FUSED_FROM + 1])
def test_a_shared_beginning_of_any_length_changes_nothing(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row beside it is long enough for torch's own attention, and in the second case the beginning itself is."""
    monkeypatch.setattr(attention, "_fused_is_faster", lambda heads: True)
    pair = make_pair(phi3_mini())
    system = make_rows([long])[0].input_ids
    branches = [system + row.input_ids for row in make_rows([30, 5, 70, 65], seed=1)]
    rows = [Encoded(ids, with_prompt(ids)) for ids in branches] + make_rows([FUSED_FROM + 9], seed=2)
    batch = pack(rows, share=True)
    assert max(depths(batch)) == 1
    assert_same(packed_step(pair.fast, batch), one_by_one(pair.plain, rows))


@pytest.mark.parametrize("seed", range(8))
def test_random_families_on_random_shapes_are_the_rows_one_by_one(seed: int) -> None:
    """Beginnings of any length, rows within rows, repeated rows, windows around a block's edge, levels mixed."""
    chance = random.Random(seed)
    heads = chance.choice([1, 2, 3, 4])
    config = small_config(
        num_attention_heads=heads,
        num_key_value_heads=chance.choice([k for k in (1, 2, heads) if heads % k == 0]),
        hidden_size=8 * heads,
        num_hidden_layers=chance.choice([1, 2, 3]),
        sliding_window=chance.choice([None, 3, 20, 64, 65]),
        initializer_range=0.15,
    )
    pair = make_pair(config, seed=seed)
    keep(pair.fast, *chance.choices(list(Level), k=config.num_hidden_layers))
    stem = make_rows([150], seed)[0].input_ids
    ids = [
        stem[: chance.choice([0, 17, 64, chance.randint(1, 150)])] + row.input_ids
        for row in make_rows([chance.randint(2, 140) for _ in range(6)], seed + 1)
    ]
    ids += [chance.choice(ids), chance.choice(ids)[: chance.randint(20, 40)]]
    rows = [Encoded(row, with_prompt(row)) for row in ids]
    wanted = one_by_one(pair.plain, rows)
    for share in (True, False):
        assert_same(packed(pair.fast, rows, share=share), wanted)


def test_rows_that_are_all_the_same_are_computed_once() -> None:
    pair = make_pair(phi3_mini())
    rows = make_rows([40]) * 3
    batch = pack(rows, share=True)
    assert batch["segments"].tolist() == [[0, 40, -1]]
    assert set(batch["weights"].tolist()) == {3.0}
    assert_same(packed_step(pair.fast, batch), one_by_one(pair.plain, rows))


def test_a_shared_label_counts_for_each_row() -> None:
    """And a token that is a label in one row alone counts for that one."""
    pair = make_pair(phi3_mini())
    system = make_rows([40])[0].input_ids
    own = [row.input_ids for row in make_rows([6, 9, 7], seed=1)]
    rows = [Encoded(system + ids, system + ids) for ids in own]
    rows[2] = Encoded(rows[2].input_ids, [-100] * 40 + own[2])
    batch = pack(rows, share=True)
    assert len(batch["segments"]) == 4
    by_position = dict(zip(batch["predicts"].tolist(), batch["weights"].tolist(), strict=True))
    assert [by_position[i] for i in range(39)] == [2.0] * 39
    assert batch["weights"].sum() == sum(row.trainable for row in rows) - 2  # nothing predicts a first token
    assert_same(packed_step(pair.fast, batch), one_by_one(pair.plain, rows))


# -- who sees whom ------------------------------------------------------------------------------------------


def subtree(batch: dict[str, Tensor], segment: int) -> set[int]:
    """A segment and all that branch from it."""
    members = {segment}
    for i, (_, _, parent) in enumerate(batch["segments"].tolist()):
        if parent in members:
            members.add(i)
    return members


def outputs(pair: Pair, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states and logits at every position of a packed row."""
    core: Any = pair.fast.get_base_model()
    positions = torch.arange(batch["input_ids"].shape[1])
    with torch.no_grad():
        hidden = core.model.packed(batch["input_ids"][0], batch["position_ids"][0], batch["segments"], positions)
        return hidden, core.lm_head(hidden)


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@shapes
def test_a_changed_token_reaches_what_follows_it_in_its_conversations_and_nothing_else(
    shape: Shape, share: bool
) -> None:
    """To the bit: in each segment in turn, the token in its middle is changed."""
    pair, rows = make_pair(shape()), family()
    batch = pack(rows, share=share, rope_limit=rope_limit(pair.plain.config))
    before = outputs(pair, batch)
    table = batch["segments"].tolist()
    for segment, (start, stop, _) in enumerate(table):
        middle = (start + stop) // 2
        ids = batch["input_ids"].clone()
        ids[0, middle] = 3 + (ids[0, middle] - 2) % 297
        after = outputs(pair, {**batch, "input_ids": ids})
        may = torch.zeros(len(before[0]), dtype=torch.bool)
        for member in subtree(batch, segment):
            may[table[member][0] : table[member][1]] = True
        may[start:middle] = False
        for old, new in zip(before, after, strict=True):
            differs = (old != new).any(-1)
            assert not (differs & ~may).any()
            assert differs[middle : middle + 2].all()
            if pair.plain.config.sliding_window is None or pair.plain.config.sliding_window > 200:
                assert torch.equal(differs, may)


# -- bfloat16 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [phi3_mini, phi4_mini, windowed])
def test_bfloat16_strays_no_further_from_float32_than_trainers(shape: Shape) -> None:
    """Trainer's: transformers in bfloat16, adapters in float32, autocast. Root mean squares over seeds and rows."""
    off: dict[str, list[tuple[float, float]]] = {"loss": [], "gradients": []}
    for seed in range(6):
        pair, rows = make_pair(shape(), torch.bfloat16, seed), make_rows([20, 31, 70, 40, 64], seed)
        exact = copy.deepcopy(pair.plain).float()
        truth, theirs, ours = (
            one_by_one(exact, rows),
            padded(pair.plain, rows, autocast=True),
            packed(pair.fast, rows),
        )
        off["gradients"].append((strayed(theirs, truth), strayed(ours, truth)))
        for row in rows:
            true = one_by_one(exact, [row]).loss
            losses = one_by_one(pair.plain, [row], autocast=True).loss, packed(pair.fast, [row]).loss
            off["loss"].append((losses[0] - true, losses[1] - true))
    for pairs in off.values():
        theirs, ours = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        assert 0 < ours < 1.5 * theirs


def strayed(step: Step, truth: Step) -> float:
    """Distance of all gradients taken as one vector."""
    assert step.gradients.keys() == truth.gradients.keys()
    assert all(grad.dtype == torch.float32 for grad in step.gradients.values())
    return distance(*(torch.cat([s.gradients[name].flatten() for name in truth.gradients]) for s in (step, truth)))


@pytest.mark.parametrize("modules", SAVED.values(), ids=SAVED)
def test_bfloat16_modules_trained_whole_get_gradients_in_their_own_dtype(modules: list[str]) -> None:
    pair = make_pair(phi3_mini(), torch.bfloat16, modules_to_save=modules)
    rows = make_rows(SOME)
    found, wanted = packed(pair.fast, rows), padded(pair.plain, rows, autocast=True)
    assert {n: g.dtype for n, g in found.gradients.items()} == {n: g.dtype for n, g in wanted.gradients.items()}
    assert found.loss == pytest.approx(wanted.loss, rel=1e-2)
    assert all(distance(grad, wanted.gradients[name]) < 0.2 for name, grad in found.gradients.items())
