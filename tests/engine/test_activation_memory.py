"""What a step keeps is chosen within the memory that is free, and the choice is said when it becomes poorer."""

from __future__ import annotations

import itertools
import logging
import resource
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Phi3Config

from phinetune.engine.activation_memory import (
    KEPT_SLACK,
    MAPPED,
    PLENTY,
    PLENTY_SHARED,
    RESERVE,
    SLACK,
    ActivationMemory,
    LayerSizes,
    Level,
)
from phinetune.engine.device_memory import LIBRARY_SPACE, _groups, _left_in_group, free_bytes, limits

KEEP, CHEAP, LAYER = Level
SIZES = LayerSizes(hidden=32, qkv=64, attended=32, inner=48, dropout=False, heads=4)
LAYERS, WIDTH = 4, 2
HUGE = 1 << 40


def config(**changes: int) -> Phi3Config:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    return Phi3Config(**shape | {"num_hidden_layers": 4, "vocab_size": 50, "pad_token_id": 0} | changes)


def memory(setting: str | int = "auto", free: int = HUGE, sizes: LayerSizes = SIZES) -> ActivationMemory:
    return ActivationMemory(setting, sizes, LAYERS, WIDTH, free)


def with_room_for(levels: list[Level], tokens: int) -> ActivationMemory:
    """Memory that just holds what a step keeps at these levels; plenty of it where something cheap is kept."""
    share = PLENTY if KEEP in levels else 1
    need = memory().needed(tokens, levels)
    found = memory(free=int(need / share / (1 - RESERVE)) + 1)
    assert need <= found.free * share <= need + 1
    return found


# -- what a layer keeps -------------------------------------------------------------------------------------------


def test_sizes_of_a_configuration() -> None:
    # 4 heads of 8 in, 2 key and 2 value heads of 8 besides.
    assert LayerSizes.of(config(), dropout=False) == SIZES
    ungrouped = LayerSizes.of(config(num_key_value_heads=4), dropout=True)
    assert ungrouped == LayerSizes(hidden=32, qkv=96, attended=32, inner=48, dropout=True, heads=4)
    wide = LayerSizes.of(config(head_dim=16), dropout=False)
    assert wide == LayerSizes(hidden=32, qkv=128, attended=64, inner=48, dropout=False, heads=4)


def test_what_a_layer_keeps_by_hand() -> None:
    # Twice what the norm takes and gives; qkv; what attention gives, and its sums; gate and up; what SwiGLU gives.
    assert SIZES.kept(KEEP) == (32 + 32) + 64 + 32 + 2 * 4 + (32 + 32) + 2 * 48 + 48
    assert SIZES.kept(CHEAP) == 32 + 64 + 32 + 2 * 4 + 32 + 2 * 48
    assert SIZES.kept(LAYER) == 32


def test_with_dropout_each_projection_keeps_its_input_and_a_mask() -> None:
    sizes = LayerSizes.of(config(), dropout=True)
    projections = 32 + 32 + 32 + 48  # qkv, o, gate_up, down
    assert sizes.kept(KEEP) == sizes.kept(CHEAP) == SIZES.kept(CHEAP) + 2 * projections
    assert sizes.kept(LAYER) == 32


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("level", list(Level))
def test_a_layer_at_work_has_what_it_did_not_keep_and_gradients(dropout: bool, level: Level) -> None:
    sizes = LayerSizes.of(config(), dropout)
    assert sizes.working(level) + sizes.kept(level) == sizes.kept(KEEP) + 64 + 3 * 48 + 3 * 32


# -- how much a step needs ----------------------------------------------------------------------------------------


def test_need_is_what_all_layers_keep_and_one_works_with() -> None:
    levels = [LAYER, CHEAP, KEEP, KEEP]
    elements = SLACK * (32 + SIZES.kept(CHEAP) + 2 * SIZES.kept(KEEP)) + SIZES.working(LAYER)
    assert memory().needed(10, levels) == int(10 * elements * WIDTH)


def test_the_allocator_leaves_no_gaps_between_tensors_that_are_mapped_by_themselves() -> None:
    tokens = -(-MAPPED // (2 * 48 * WIDTH))  # gate and up are the first to be so large
    small, large = (memory().kept(count, [CHEAP]) for count in (tokens - 1, tokens))
    assert small == int((tokens - 1) * WIDTH * SLACK * SIZES.kept(CHEAP))
    assert large == int(tokens * WIDTH * (SLACK * (SIZES.kept(CHEAP) - 96) + 96))


def test_kept_memory_has_small_gaps_between_tensors_of_any_size() -> None:
    for tokens in (10, MAPPED):
        of = ActivationMemory("auto", SIZES, LAYERS, WIDTH, 1 << 50, keeps=True)
        assert of.kept(tokens, [CHEAP]) == pytest.approx(
            tokens * WIDTH * KEPT_SLACK * SIZES.kept(CHEAP), rel=1e-6, abs=1
        )


@pytest.mark.parametrize("dropout", [False, True])
def test_need_grows_with_tokens_and_with_what_is_kept(dropout: bool) -> None:
    of = memory(sizes=LayerSizes.of(config(), dropout))
    for levels in itertools.product(Level, repeat=LAYERS):
        assert 0 < of.needed(7, levels) < of.needed(8, levels), levels
        for i, level in enumerate(levels):
            for less in Level:
                if less > level:
                    lighter = [*levels[:i], less, *levels[i + 1 :]]
                    assert of.needed(7, lighter) <= of.needed(7, levels), (levels, lighter)


# -- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "levels"),
    [
        ("none", [KEEP] * 4),
        ("all", [LAYER] * 4),
        (0, [KEEP] * 4),
        (1, [LAYER, KEEP, KEEP, KEEP]),
        (3, [LAYER, LAYER, LAYER, KEEP]),
        ("3", [LAYER, LAYER, LAYER, KEEP]),
        (4, [LAYER] * 4),
        (99, [LAYER] * 4),
    ],
)
@pytest.mark.parametrize("free", [0, HUGE])
def test_a_fixed_setting_holds_whatever_is_free(setting: str | int, levels: list[Level], free: int) -> None:
    assert memory(setting, free).choose(1000) == levels


def test_auto_keeps_all_where_memory_is_ample() -> None:
    assert memory().choose(1000) == [KEEP] * 4


def test_auto_recomputes_all_where_nothing_fits() -> None:
    assert memory(free=0).choose(1000) == [LAYER] * 4
    assert memory(free=-5).choose(1) == [LAYER] * 4


STEPS = [
    [KEEP, KEEP, KEEP, KEEP],
    [CHEAP, KEEP, KEEP, KEEP],
    [CHEAP, CHEAP, KEEP, KEEP],
    [CHEAP, CHEAP, CHEAP, KEEP],
    [CHEAP, CHEAP, CHEAP, CHEAP],
    [LAYER, CHEAP, CHEAP, CHEAP],
    [LAYER, LAYER, CHEAP, CHEAP],
    [LAYER, LAYER, LAYER, CHEAP],
    [LAYER, LAYER, LAYER, LAYER],
]


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_auto_takes_cheap_before_whole_layers_and_the_first_layers_first(step: int) -> None:
    just = with_room_for(STEPS[step], 1000)
    assert just.choose(1000) == STEPS[step]
    assert just.choose(1001) == STEPS[min(step + 1, 8)]


def test_auto_holds_a_reserve_back() -> None:
    need = memory().needed(1000, [CHEAP] * 4)
    assert memory(free=need).choose(1000) != [CHEAP] * 4
    assert memory(free=round(need / (1 - RESERVE)) + 2).choose(1000) == [CHEAP] * 4


def test_auto_keeps_what_is_cheap_only_where_memory_is_plenty() -> None:
    need = memory().needed(1000, [KEEP] * 4)
    assert memory(free=round(need / (1 - RESERVE)) + 2).choose(1000) == [CHEAP] * 4
    assert memory(free=round(need / PLENTY / (1 - RESERVE)) + 10).choose(1000) == [KEEP] * 4


def test_memory_that_is_shared_is_never_plenty_beyond_a_fixed_amount() -> None:
    of = ActivationMemory("auto", SIZES, LAYERS, WIDTH, HUGE, shared=True)
    tokens = 1000 * PLENTY_SHARED // of.needed(1000, [KEEP] * 4)
    assert of.choose(tokens - 1000) == memory().choose(tokens - 1000) == [KEEP] * 4
    assert of.choose(2 * tokens) == [CHEAP] * 4
    assert memory().choose(2 * tokens) == [KEEP] * 4


def test_auto_never_keeps_more_for_more_tokens() -> None:
    of = with_room_for([CHEAP] * 4, 500)
    sums = [sum(of.choose(tokens)) for tokens in range(1, 3000)]
    assert sums == sorted(sums)
    assert set(sums) == set(range(9))
    assert all(of.needed(tokens, of.choose(tokens)) <= of.free for tokens in range(1, 1000, 7))


# -- what is said -------------------------------------------------------------------------------------------------


def test_a_choice_is_logged_once_and_again_when_less_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    of = with_room_for([CHEAP] * 4, 500)
    with caplog.at_level(logging.INFO, logger="phinetune.engine.activation_memory"):

        def lines(tokens: int) -> int:
            caplog.clear()
            assert of(tokens) == of.choose(tokens)
            return len(caplog.messages)

        assert [lines(tokens) for tokens in (20, 20, 10, 500, 500, 20, 499, 100_000, 500, 200_000)] == [
            *(1, 0, 0),  # all kept
            *(1, 0, 0, 0),  # the norms and SwiGLU computed again
            *(1, 0, 0),  # everything
        ]


def test_the_log_line_counts_layers_and_bytes(caplog: pytest.LogCaptureFixture) -> None:
    sizes = LayerSizes(3072, 9216, 3072, 8192, dropout=False)
    of = ActivationMemory("auto", sizes, 32, 2, free=20 << 30)
    levels = [LAYER] * 3 + [CHEAP] * 4 + [KEEP] * 25
    need = of.needed(12_345, levels) / 2**30
    assert of.describe(12_345, levels) == (
        "12,345 tokens a step: 25 of 32 layers keep all, 4 recompute norms and SwiGLU, 3 are recomputed whole; "
        f"about {need:.1f} GiB of 17.0 GiB"
    )
    with caplog.at_level(logging.INFO, logger="phinetune.engine.activation_memory"):
        found = of(12_345)
    assert caplog.messages == [f"activation memory: {of.describe(12_345, found)}"]


# -- what is free -------------------------------------------------------------------------------------------------


def test_a_cpu_has_some_memory_free_and_no_more_than_there_is() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def control_group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 400\nfile 300\ninactive_file 200\nactive_file 100\n")
    return folder


def test_a_control_groups_limit_counts_less_what_it_holds_but_for_its_cache(tmp_path: Path) -> None:
    assert _left_in_group(control_group(tmp_path, "1000")) == 1000 - 700 + 200


def test_without_a_limit_all_counts(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert _left_in_group(tmp_path / "none") > total
    assert _left_in_group(control_group(tmp_path, "max")) > total


def older_control_group(folder: Path, limit: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text("700\n")
    (folder / "memory.stat").write_text("cache 300\ninactive_file 1\ntotal_inactive_file 200\n")
    return folder


def test_a_control_group_of_version_1_counts_alike(tmp_path: Path) -> None:
    assert _left_in_group(older_control_group(tmp_path, "1000")) == 1000 - 700 + 200


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("0::/\n", [""]),  # version 2, in a container
        ("0::/user/me\n", ["user/me", "user", ""]),  # a service of a machine: groups around it count, too
        ("9:name=systemd:/\n4:memory:/docker/ab\n", ["memory/docker/ab", "memory/docker", "memory"]),
        ("4:hugetlb,memory:/\n0::/x\n", ["memory", "x", ""]),  # both versions
        ("9:name=systemd:/\n", []),
    ],
)
def test_the_groups_of_a_process_are_found(tmp_path: Path, names: str, expected: list[str]) -> None:
    (tmp_path / "own").write_text(names)
    mount = tmp_path / "mount"
    assert list(_groups(mount, tmp_path / "own")) == [mount / name for name in expected]
    assert list(_groups(mount, tmp_path / "no such file")) == []


def test_the_shells_limit_of_address_space_counts() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = psutil.Process().memory_info().vms
    assert "ulimit" not in str(limits())
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + LIBRARY_SPACE + (1 << 28), before[1]))
        (limit,) = [limit for limit in limits() if "ulimit" in limit.name]
        free = free_bytes(torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 0 < limit.left <= 1 << 28
    assert free <= 1 << 28
