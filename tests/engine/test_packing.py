"""A packed row holds every conversation and every label, whatever of it is shared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from phinetune.engine.examples import Encoded
from phinetune.engine.packing import WORTH, PackedCollator, fill_rows, pack
from phinetune.engine.segments import SHORTEST_SHARED

Prediction = tuple[tuple[int, ...], int]

SYSTEM = list(range(100, 140))


def row(ids: Sequence[int], prompt: int = 0) -> Encoded:
    """A conversation that trains on all but its first `prompt` tokens."""
    return Encoded(list(ids), ([-100] * prompt + list(ids[prompt:]))[: len(ids)])


def table(packed: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    return [(start, stop, parent) for start, stop, parent in packed["segments"].tolist()]


def places(packed: dict[str, Tensor]) -> list[list[int]]:
    """Where the tokens that a segment's last token sees lie, by the path from its root."""
    found: list[list[int]] = []
    for i, (start, stop, parent) in enumerate(table(packed)):
        assert -1 <= parent < i
        found.append([*(found[parent] if parent >= 0 else []), *range(start, stop)])
    return found


def texts(packed: dict[str, Tensor]) -> list[list[int]]:
    """The tokens on the path to each segment, its own included."""
    ids = packed["input_ids"][0].tolist()
    return [[ids[place] for place in path] for path in places(packed)]


def predictions(packed: dict[str, Tensor]) -> Counter[Prediction]:
    """What is predicted after what, and how often it counts, read back from a packed row."""
    ids, path_to = packed["input_ids"][0].tolist(), {path[-1]: path for path in places(packed)}
    for path in places(packed):
        for i, place in enumerate(path):
            path_to[place] = path[: i + 1]
    found: Counter[Prediction] = Counter()
    for place, label, weight in zip(*(packed[key].tolist() for key in ("predicts", "labels", "weights")), strict=True):
        found[tuple(ids[i] for i in path_to[place]), label] += weight
    return found


def row_by_row(rows: Sequence[Encoded]) -> Counter[Prediction]:
    return Counter(
        (tuple(one.input_ids[:i]), label)
        for one in rows
        for i, label in enumerate(one.labels)
        if i > 0 and label != -100
    )


def assert_packs(rows: Sequence[Encoded], packed: dict[str, Tensor]) -> None:
    """All of what makes a packed row right, whether anything is shared or not."""
    tokens, segments = packed["input_ids"].shape[1], table(packed)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, tokens)
    assert packed["segments"].shape == (len(segments), 3)
    assert packed["predicts"].shape == packed["labels"].shape == packed["weights"].shape
    assert packed["weights"].dtype == torch.float32
    assert {packed[key].dtype for key in packed if key != "weights"} == {torch.int64}
    assert int(packed["row_tokens"]) == sum(len(one.input_ids) for one in rows)
    # The segments lie one after another, and each path through them is whole.
    assert [start for start, _, _ in segments] == [0, *(stop for _, stop, _ in segments[:-1])]
    assert segments[-1][1] == tokens
    assert all(start < stop for start, stop, _ in segments)
    for path in places(packed):
        assert packed["position_ids"][0, path].tolist() == list(range(len(path)))
    ends = [tuple(text) for text in texts(packed)]
    assert {tuple(one.input_ids) for one in rows} <= set(ends)
    # Every last segment of a path is some conversation's end.
    parents = {parent for _, _, parent in segments}
    leaves = [text for i, text in enumerate(ends) if i not in parents]
    assert set(leaves) <= {tuple(one.input_ids) for one in rows}
    assert predictions(packed) == row_by_row(rows)


def shared(rows: Sequence[Encoded], rope_limit: int | None = None) -> dict[str, Tensor]:
    packed = pack(rows, share=True, rope_limit=rope_limit)
    assert_packs(rows, packed)
    return packed


def lengths(packed: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Each segment's length and parent."""
    return [(stop - start, parent) for start, stop, parent in table(packed)]


# -- without sharing ----------------------------------------------------------------------------------------------


def test_conversations_lie_one_after_another_with_positions_of_their_own() -> None:
    rows = [row([5, 6, 7, 8], prompt=2), row([9]), row([5, 6, 7], prompt=1)]
    packed = pack(rows)
    assert_packs(rows, packed)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 6, 7]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert packed["segments"].tolist() == [[0, 4, -1], [4, 5, -1], [5, 8, -1]]


def test_a_position_predicts_the_next_label_once() -> None:
    rows = [row([5, 6, 7, 8], prompt=2), row([9]), row([5, 6, 7], prompt=1)]
    packed = pack(rows)
    assert packed["predicts"].tolist() == [1, 2, 5, 6]
    assert packed["labels"].tolist() == [7, 8, 6, 7]
    assert packed["weights"].tolist() == [1.0] * 4


def test_a_first_tokens_label_is_predicted_by_nothing() -> None:
    assert pack([row([5, 6])])["labels"].tolist() == [6]


def test_what_is_alike_is_repeated_unless_sharing_is_asked_for() -> None:
    rows = [row(SYSTEM), row(SYSTEM)]
    packed = pack(rows)
    assert_packs(rows, packed)
    assert lengths(packed) == [(40, -1), (40, -1)]
    assert packed["weights"].tolist() == [1.0] * 78


@pytest.mark.parametrize("share", [False, True])
def test_rows_without_labels_give_none(share: bool) -> None:
    rows = [row(SYSTEM, prompt=40), row([*SYSTEM, 1], prompt=41)]
    packed = pack(rows, share=share)
    assert_packs(rows, packed)
    assert packed["labels"].numel() == 0


# -- with sharing -------------------------------------------------------------------------------------------------


def test_a_common_system_prompt_is_computed_once() -> None:
    rows = [row([*SYSTEM, i, i + 1, i + 2], prompt=41) for i in range(4)]
    packed = shared(rows)
    assert lengths(packed) == [(40, -1), (3, 0), (3, 0), (3, 0), (3, 0)]
    assert packed["position_ids"][0, 40:46].tolist() == [40, 41, 42] * 2
    assert int(packed["row_tokens"]) == 4 * 43
    assert packed["weights"].tolist() == [1.0] * 8


def test_a_label_in_the_common_part_counts_for_all_that_train_on_it() -> None:
    rows = [row([*SYSTEM, 1, 2], prompt=39), row([*SYSTEM, 3, 4], prompt=39), row([*SYSTEM, 5, 6], prompt=40)]
    packed = shared(rows)
    counts = dict(zip(packed["labels"].tolist(), packed["weights"].tolist(), strict=True))
    assert counts == {SYSTEM[-1]: 2.0, **dict.fromkeys(range(1, 7), 1.0)}
    # The last common token predicts what each branch begins with.
    assert packed["predicts"].tolist().count(39) == 3


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = [row([*SYSTEM, i % 3, i], prompt=41) for i in range(5)] + [row([7, 8, 9])]
    assert predictions(shared(rows)) == predictions(shared(rows[::-1]))
    assert sorted(lengths(shared(rows))) == sorted(lengths(shared(rows[::-1])))


def test_a_dialogue_that_another_row_continues_is_its_root() -> None:
    rows = [row([*SYSTEM, 1, 2, 3], prompt=20), row(SYSTEM, prompt=20)]
    packed = shared(rows)
    assert lengths(packed) == [(40, -1), (3, 0)]
    assert packed["weights"].sum() == 20 + 23


@pytest.mark.parametrize(
    "longer", [[[1, 2, 3]], [[1, 2], [3, 4], [1, 2]]], ids=["one continues", "two of them identical"]
)
def test_a_label_of_several_rows_is_kept_once(longer: list[list[int]]) -> None:
    packed = shared([row(SYSTEM), *(row([*SYSTEM, *more]) for more in longer)])
    pairs = list(zip(packed["predicts"].tolist(), packed["labels"].tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert packed["weights"].max() == 1 + len(longer)


def test_identical_rows_are_computed_once_and_count_each() -> None:
    packed = shared([row(SYSTEM, prompt=30)] * 3)
    assert lengths(packed) == [(40, -1)]
    assert packed["labels"].tolist() == SYSTEM[30:]
    assert packed["weights"].tolist() == [3.0] * 10


def test_identical_rows_may_train_on_different_parts() -> None:
    packed = shared([row(SYSTEM, prompt=30), row(SYSTEM, prompt=38)])
    assert dict(zip(packed["labels"].tolist(), packed["weights"].tolist(), strict=True)) == {
        **dict.fromkeys(SYSTEM[30:38], 1.0),
        **dict.fromkeys(SYSTEM[38:], 2.0),
    }


def test_three_levels() -> None:
    first, second = list(range(200, 220)), list(range(300, 330))
    rows = [
        row([*SYSTEM, *first, *second, 1, 2]),
        row([*SYSTEM, *first, *second, 3]),
        row([*SYSTEM, *first, 4, 5]),
        row([*SYSTEM, 6]),
        row([7, 8]),
    ]
    packed = shared(rows)
    assert sorted(lengths(packed)) == sorted([(2, -1), (40, -1), (1, 1), (20, 1), (2, 3), (30, 3), (2, 5), (1, 5)])
    assert max(len(text) for text in texts(packed)) == 92


def test_fewer_common_tokens_than_the_shortest_are_not_shared() -> None:
    def alike(count: int) -> list[tuple[int, int]]:
        return lengths(shared([row([*SYSTEM[:count], 1]), row([*SYSTEM[:count], 2])]))

    assert alike(SHORTEST_SHARED) == [(SHORTEST_SHARED, -1), (1, 0), (1, 0)]
    assert alike(SHORTEST_SHARED - 1) == [(SHORTEST_SHARED, -1), (SHORTEST_SHARED, -1)]


def test_a_branch_shares_on_only_with_enough_tokens_of_its_own() -> None:
    more = list(range(200, 200 + SHORTEST_SHARED))
    rows = [row([*SYSTEM, *more[:-1], i]) for i in (1, 2)]
    assert lengths(shared([*rows, row([*SYSTEM, 3])])) == [(40, -1), (1, 0), (16, 0), (16, 0)]
    rows = [row([*SYSTEM, *more, i]) for i in (1, 2)]
    assert lengths(shared([*rows, row([*SYSTEM, 3])])) == [(40, -1), (1, 0), (16, 0), (1, 2), (1, 2)]


def test_nothing_is_shared_where_it_spares_too_little() -> None:
    def with_others(tokens: int) -> list[tuple[int, int]]:
        rest = row(range(1000, 1000 + tokens))
        return lengths(shared([row([*SYSTEM, 1]), row([*SYSTEM, 2]), rest]))

    spared = 40
    most = round(spared / WORTH) - 82  # of the others, so that just enough of the whole is spared
    assert len(with_others(most)) == 4
    assert with_others(most + 1) == [(41, -1), (41, -1), (most + 1, -1)]


def test_one_conversation_has_nothing_to_share() -> None:
    assert lengths(shared([row(SYSTEM)])) == [(40, -1)]


def test_conversations_beyond_the_rope_limit_share_only_among_themselves() -> None:
    rows = [row([*SYSTEM, 1]), row([*SYSTEM, 2]), row([*SYSTEM, 3, 4]), row([*SYSTEM, 3, 5])]
    assert lengths(shared(rows, rope_limit=41)) == [(40, -1), (1, 0), (1, 0), (41, -1), (1, 3), (1, 3)]
    one = [(40, -1), (1, 0), (1, 0), (2, 0), (2, 0)]
    assert lengths(shared(rows)) == lengths(shared(rows, rope_limit=42)) == lengths(shared(rows, rope_limit=40)) == one


def test_no_tree_mixes_kinds_of_rotation() -> None:
    rows = [row([*SYSTEM[:16], *range(i)]) for i in range(30)]
    packed = shared(rows, rope_limit=25)
    paths = places(packed)
    longest = Counter[int]()
    for path in paths:
        longest[path[0]] = max(longest[path[0]], len(path))
    # Each conversation ends in a tree whose longest path is of its own kind.
    for one in rows:
        ends = [path for path, text in zip(paths, texts(packed), strict=True) if text == one.input_ids]
        assert any((longest[path[0]] > 25) is (len(one.input_ids) > 25) for path in ends), one.input_ids


def random_rows(seed: int) -> list[Encoded]:
    """Rows that often begin alike, end early, recur and continue one another; labels at random."""
    rng = random.Random(seed)
    rows: list[Encoded] = []
    for _ in range(rng.randint(1, 10)):
        start = rng.choice(rows).input_ids if rows and rng.random() < 0.8 else []
        ids = start[: rng.randint(0, len(start))] if rng.random() < 0.5 else list(start)
        ids = ids + [rng.randint(0, 1) for _ in range(rng.choice([0, 1, 2, 17, 30]))] or [rng.randint(0, 1)]
        rows.append(Encoded(ids, [i if rng.random() < 0.6 else -100 for i in ids]))
    return rows


@pytest.mark.parametrize("seed", range(150))
def test_random_rows_are_all_there_with_all_their_labels(seed: int) -> None:
    rows = random_rows(seed)
    assert_packs(rows, pack(rows))
    shared(rows)
    shared(rows, rope_limit=30)


def test_many_of_the_random_rows_share_something() -> None:
    packed = [pack(random_rows(seed), share=True) for seed in range(150)]
    assert sum(one["input_ids"].shape[1] < int(one["row_tokens"]) for one in packed) > 50


# -- from examples to rows ----------------------------------------------------------------------------------------


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("share", [False, True])
def test_the_collator_packs_examples(share: bool) -> None:
    rows = [row([*SYSTEM, i], prompt=40) for i in range(3)]
    collate = PackedCollator(share=share, rope_limit=None)
    assert_same(collate([one._asdict() for one in rows]), pack(rows, share=share))


def test_an_example_may_hold_several_conversations() -> None:
    rows = [row([1, 2, 3], prompt=1), row([4, 5]), row([6]), row([7, 8, 9])]
    examples = [
        {
            "input_ids": [1, 2, 3, 4, 5, 6],
            "labels": [-100, 2, 3, 4, 5, 6],
            "seq_lengths": [3, 2, 1],
        },
        {"input_ids": [7, 8, 9], "labels": [7, 8, 9], "seq_lengths": None},
    ]
    assert_same(PackedCollator(share=False, rope_limit=None)(examples), pack(rows))


def test_the_collator_passes_the_rope_limit_on() -> None:
    rows = [row([*SYSTEM, 1]), row([*SYSTEM, 2, 3])]
    examples = [one._asdict() for one in rows]
    assert lengths(PackedCollator(share=True, rope_limit=41)(examples)) == [(41, -1), (42, -1)]
    assert lengths(PackedCollator(share=True, rope_limit=42)(examples)) == [(40, -1), (1, 0), (2, 0)]


def test_filled_rows_hold_every_conversation_whole_and_no_more_than_fits() -> None:
    rng = random.Random(0)
    rows = [row(rng.choices(range(50), k=rng.randint(1, 20)), prompt=rng.randint(0, 3)) for _ in range(60)]
    filled = fill_rows(Dataset.from_list([one._asdict() for one in rows]), 20)
    assert all(len(one["input_ids"]) == sum(one["seq_lengths"]) <= 20 for one in filled)
    assert len(filled) < len(rows) / 1.5
    packed = PackedCollator(share=False, rope_limit=None)(list(filled))
    assert_packs(rows, packed)
    assert sorted(map(tuple, texts(packed))) == sorted(tuple(one.input_ids) for one in rows)
