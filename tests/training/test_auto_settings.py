"""Each rule for a setting that is left open, with numbers of known kind."""

from __future__ import annotations

import pytest

from phinetune.training import auto_settings as rules


@pytest.mark.parametrize(
    ("hidden", "steps", "rate"),
    [
        (576, 200, 1.3e-3),
        (576, 60, 2e-3),
        (3072, 1000, 3.6e-4),
        (3072, 99, 5.4e-4),
        (5120, 1000, 2.4e-4),
        (32, 1, 3e-3),
    ],
)
def test_the_rate_falls_with_width_and_is_higher_for_short_runs(hidden: int, steps: int, rate: float) -> None:
    assert rules.learning_rate(hidden, steps) == pytest.approx(rate)
    assert rules.learning_rate(hidden, steps, by_heart=True) == pytest.approx(rate / 2, rel=0.05)  # two digits


@pytest.mark.parametrize(
    ("trained", "widest", "rank"),
    [
        (0, 512, 16),
        (15_999, 512, 16),
        (16_000, 512, 32),
        (100_000, 512, 128),
        (10**9, 512, 128),
        (10**9, 40, 32),
        (9, 4, 16),
    ],
)
def test_the_rank_lets_the_parameters_outnumber_the_trained_tokens(trained: int, widest: int, rank: int) -> None:
    assert rules.rank(trained, 1_000, widest) == rank


def test_alpha_gives_the_same_scale_with_and_without_rslora() -> None:
    for r in (16, 64):
        assert rules.alpha(r, False) / r == pytest.approx(rules.alpha(r, True) / r**0.5, rel=0.01)


def test_small_sets_get_more_epochs_and_smaller_steps() -> None:
    counts = (10, 500, 501, 2_000, 2_001, 20_000, 20_001)
    assert [rules.epochs(rows) for rows in counts] == [4, 4, 3, 3, 2, 2, 1]
    assert [rules.epochs(rows, unlike=True) for rows in counts] == [2, 2, 2, 2, 2, 2, 1]
    assert [rules.batch(rows) for rows in (1, 80, 159, 160, 320, 640, 10**6)] == [2, 2, 2, 4, 8, 16, 16]


@pytest.mark.parametrize(
    ("rows", "longest", "room", "processes", "split"),
    [
        (16, 100, 10**6, 1, (16, 1)),
        (16, 1_000, 5_000, 1, (4, 4)),
        (16, 1_000, 10, 1, (1, 16)),  # a row has to fit in any case
        (16, 1_000, 3_000, 4, (2, 2)),
        (2, 100, 10**6, 8, (1, 1)),
    ],
)
def test_a_step_is_cut_as_memory_and_processes_ask(
    rows: int, longest: int, room: int, processes: int, split: tuple[int, int]
) -> None:
    assert rules.split_batch(rows, longest, room, processes) == split


def test_short_runs_have_no_warmup_and_long_ones_no_long_one() -> None:
    assert [rules.warmup(steps) for steps in (1, 39, 40, 200, 10**5)] == [0, 0, 2, 10, 100]


def test_lengths_fit_the_longest_chat_the_model_and_the_memory() -> None:
    assert rules.length_cap(131_072, 10**6) == 4096
    assert rules.length_cap(2048, 10**6) == 2048
    assert rules.length_cap(131_072, 3_000) == 2048
    assert rules.length_cap(131_072, 0) == 1024
    assert [rules.length(longest, 2048) for longest in (5, 1_025, 1_984, 5_000)] == [1024, 1088, 1984, 2048]


def test_evaluations_take_a_bounded_part_of_the_time() -> None:
    assert rules.evaluation_interval(100, 90_000, 1_000, False) == 10  # ten at most
    assert rules.evaluation_interval(100, 9_000, 1_000, False) == 25  # 0.15 · 9,000 tokens buy four of a third of 1,000
    assert rules.evaluation_interval(100, 4_000, 1_000, False) is None
    assert rules.evaluation_interval(100, 4_000, 1_000, True) == 34
    assert rules.evaluation_interval(1, 4_000, 1_000, True) == 1


def test_four_evaluations_of_a_part_fit_into_the_time() -> None:
    # 0.15 · 90,000 tokens buy four times a third of 33 · 300
    assert rules.scored_rows(90_000, 300_000, 1_000, False) == 33
    assert rules.scored_rows(80_000, 300_000, 1_000, False) is None
    assert rules.scored_rows(80_000, 300_000, 1_000, True) == 32
    assert rules.scored_rows(90_000, 3_000, 40, False) == 40


def test_checkpoints_are_few_and_not_close_together() -> None:
    assert [rules.save_interval(steps) for steps in (3, 40, 41, 400)] == [10, 10, 11, 100]


@pytest.mark.parametrize(("save", "interval", "found"), [(100, 30, 50), (100, 100, 100), (100, 300, 100), (7, 3, 7)])
def test_evaluations_meet_the_checkpoints_of_the_user(save: int, interval: int, found: int) -> None:
    assert rules.together(save, interval) == found


def test_how_far_a_value_is_from_its_rule_in_words() -> None:
    assert rules.times(2e-5, 4e-4) == "some 20 times below"
    assert rules.times(4e-3, 4e-4) == "some 10 times above"
    assert rules.times(2e-4, 4e-4) is None
    assert rules.times(0, 4e-4) is None
