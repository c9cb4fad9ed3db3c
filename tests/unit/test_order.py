"""How what the ranks saw becomes one sequence."""

from __future__ import annotations

import random

import pytest

from shardwise.plan.order import insert, merge


def is_subsequence(small: list[int], large: list[int]) -> bool:
    rest = iter(large)
    return all(i in rest for i in small)


@pytest.mark.parametrize(
    ("seen", "merged"),
    [
        ([[0, 1, 2]], [0, 1, 2]),
        ([[0, 1, 2], [0, 1, 2]], [0, 1, 2]),
        ([[0, 2], [0, 1, 2]], [0, 1, 2]),
        ([[0, 1, 3], [0, 2, 3]], [0, 1, 2, 3]),
        ([[], [1, 0], []], [1, 0]),
        ([[0, 1, 0], [0, 1]], [0, 1, 0]),
        ([], None),
    ],
)
def test_a_merged_sequence_has_every_ranks_in_rank_0s_order(seen: list[list[int]], merged: list[int] | None) -> None:
    if merged is None:
        with pytest.raises(IndexError):
            merge(seen)
    else:
        assert merge(seen) == merged


def test_every_rank_finds_its_own_sequence_in_the_merged_one() -> None:
    for seed in range(200):
        source = random.Random(seed)
        seen = [[source.randrange(5) for _ in range(source.randrange(8))] for _ in range(source.randrange(1, 4))]
        merged = merge(seen)
        assert all(is_subsequence(own, merged) for own in seen), (seen, merged)
        assert set(merged) == set().union(*seen)
        assert seen[0] == merge(seen[:1])


@pytest.mark.parametrize(
    ("sequence", "i", "natural", "found"),
    [
        ([0, 1, 3], 2, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 2], 0, [0, 1, 2], [0, 1, 2]),
        ([], 1, [0, 1], [1]),
        ([3, 0], 2, [0, 1, 2, 3], [3, 0, 2]),
        ([3, 1, 0], 2, [3, 2, 1, 0], [3, 2, 1, 0]),
        ([0, 1, 0], 2, [0, 1, 2], [0, 1, 2, 0]),
    ],
)
def test_what_is_inserted_follows_its_nearest_predecessor(
    sequence: list[int], i: int, natural: list[int], found: list[int]
) -> None:
    insert(sequence, i, natural)
    assert sequence == found
