"""A group of one rank: each collective of tensors is a copy or nothing, without a process group, and checks sizes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shardwise.errors import LayoutError, RankError
from shardwise.ranks.group import Group
from shardwise.ranks.ranks import Ranks
from shardwise.ranks.waiting import Attendance, waiting
from shardwise.zero.norms import addend, over_owners

CPU = torch.device("cpu")


def alone() -> Group:
    return Group.alone(CPU, Attendance(0))


def test_a_group_of_one_gathers_and_reduces_by_copying() -> None:
    group, shard = alone(), torch.arange(4.0)
    whole, out = torch.zeros(4), torch.zeros(4)
    group.all_gather(whole, shard)
    group.reduce_scatter(shard, out)
    assert torch.equal(whole, shard)
    assert torch.equal(out, shard)
    wholes = [torch.zeros(4), torch.zeros(2, dtype=torch.uint8)]
    group.all_gather_together(wholes, [shard, torch.ones(2, dtype=torch.uint8)])
    assert torch.equal(wholes[0], shard)
    assert torch.equal(wholes[1], torch.ones(2, dtype=torch.uint8))
    assert group.counts == {"all_gather": 2, "reduce_scatter": 1}


def test_a_group_of_one_leaves_what_it_is_to_combine_as_it_is() -> None:
    group = alone()
    for act in (group.all_reduce_gradient, group.all_reduce, group.broadcast):
        values = torch.tensor([3.0, -1.0])
        act(values)
        assert values.tolist() == [3.0, -1.0]
    group.fence()
    assert [tensor.tolist() for tensor in group.map_shared(2, torch.float32)] == [[0.0, 0.0]]
    assert not group.blocking
    assert not group.parted
    assert group.let_go() == []


def test_a_group_refuses_sizes_that_its_ranks_do_not_divide() -> None:
    group = Group(1, 3, CPU, Attendance(1), Counter())
    with pytest.raises(
        LayoutError, match=r"all_gather: whole has 7 elements, which is not 3 ranks times the shard's 2"
    ):
        group.all_gather(torch.zeros(7), torch.zeros(2))
    with pytest.raises(
        LayoutError, match=r"reduce_scatter: partial has 5 elements, which is not 3 ranks times the out"
    ):
        group.reduce_scatter(torch.zeros(5), torch.zeros(2))
    assert not group.counts


def test_what_one_group_finds_missing_the_others_say_too() -> None:
    class Broken(Group):
        @waiting
        def fence(self) -> None:
            raise RuntimeError("Connection closed by peer")

    attendance = Attendance(2)
    broken, other = Broken(0, 1, CPU, attendance, Counter()), Group.alone(CPU, attendance)
    for group in (broken, other):
        with pytest.raises(
            RankError, match=r"rank 2 waited for the other ranks in fence, and at least one did not come"
        ):
            group.fence()
    assert other.counts == {}


def test_a_run_of_one_rank_holds_its_copy_alone() -> None:
    ranks = Ranks.join(use_cpu=True)
    assert (ranks.shards.rank, ranks.shards.size) == (0, 1)
    assert (ranks.copies.rank, ranks.copies.size) == (0, 1)
    ranks.shards.all_reduce_gradient(torch.ones(1))
    ranks.copies.all_reduce_gradient(torch.ones(1))
    assert ranks.counts == {"all_reduce_gradient": 1}


@pytest.mark.parametrize(("sharded", "alike"), [(True, 2), (False, 6)])
def test_a_sum_over_all_ranks_counts_each_element_once(sharded: bool, alike: int) -> None:
    """Six ranks, three of which divide a copy: two hold the same part, or all six the same whole."""
    ranks = cast(Any, SimpleNamespace(world_size=6, alike=SimpleNamespace(size=2)))
    assert float(addend(torch.tensor(12.0), ranks, sharded=sharded)) * alike == 12.0


def test_whole_gradients_are_summed_without_a_message() -> None:
    own = torch.tensor(5.0)
    assert over_owners(own, 2.0, cast(Any, None), sharded=False) is own
