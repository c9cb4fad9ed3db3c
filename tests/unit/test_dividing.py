"""Which ranks hold one copy together, and which hold the same part of it: arithmetic on places, the same on every rank."""

from __future__ import annotations

import itertools

import pytest

from shardwise.errors import ConfigError
from shardwise.ranks.dividing import divide


@pytest.mark.parametrize(
    ("shard_group", "machines", "groups"),
    [
        ("world", [], ((0, 1, 2, 3),)),
        ("machine", [], ((0, 1, 2, 3),)),
        (4, [0, 0, 1, 1], ((0, 1, 2, 3),)),
        (2, [], ((0, 1), (2, 3))),
        (1, [], ((0,), (1,), (2,), (3,))),
        ("machine", [0, 0, 1, 1], ((0, 1), (2, 3))),
        ("machine", [0, 1, 0, 1], ((0, 2), (1, 3))),
        (2, [0, 1, 0, 1], ((0, 2), (1, 3))),  # a group that fits on a machine lies on one
        (2, [0, 1, 1, 1], ((0, 1), (2, 3))),
    ],
)
def test_groups_are_filled_machine_by_machine(shard_group, machines, groups) -> None:
    assert divide(shard_group, 4, machines).groups == groups


def test_the_place_in_a_group_says_which_ranks_hold_the_same() -> None:
    for size, machines in itertools.product((1, 2, 3, 4, 6, 12), ([], [0, 1] * 6, [0] * 3 + [1] * 9)):
        division = divide(size, 12, machines)
        assert sorted(rank for group in division.groups for rank in group) == list(range(12))
        for rank in range(12):
            shards, copies = division.shards(rank), division.copies(rank)
            assert len(shards) == size
            assert len(copies) == 12 // size
            assert set(shards) & set(copies) == {rank}
            assert all(division.copies(other) == copies for other in copies)


def test_a_number_that_does_not_divide_the_ranks_is_told_with_those_that_do() -> None:
    for size in (3, 8):
        with pytest.raises(
            ConfigError, match=rf"shard_group: {size} does not divide the 4 rank.* \(1, 2, 4\), machine or"
        ):
            divide(size, 4, [])


def test_machines_of_different_sizes_are_told_with_their_ranks() -> None:
    with pytest.raises(
        ConfigError,
        match=r"equally many ranks on every machine, and machine 0 has ranks 0, 2-3, machine 1 has rank 1\. ",
    ):
        divide("machine", 4, [0, 1, 0, 0])
    assert divide(2, 4, [0, 1, 0, 0]).groups == ((0, 2), (1, 3))
