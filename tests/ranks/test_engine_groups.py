"""Small blocks that share a unit train as they do alone: on GPUs they always do, here they are made to."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from rig.engine import Block, CheckpointedTower, prepare, tower, train_both
from rig.groups import BLOCK_NBYTES, grouped


def test_blocks_share_a_unit_up_to_its_size_and_only_neighbours_of_one_class():
    from shardwise.plan.units import find_units

    def entries(model, blocks):
        units = find_units(model, unit_nbytes=int(blocks * BLOCK_NBYTES))
        return [(len(unit.entries), unit.in_turn) for unit in units if not unit.name.startswith("(")]

    assert entries(tower(5), 2) == [(2, True), (2, True), (1, False)]
    assert entries(tower(5), 2.9) == [(2, True), (2, True), (1, False)]
    assert entries(tower(5), 9) == [(5, True)]
    assert entries(tower(3), 0.5) == [(1, False)] * 3
    two = nn.ModuleDict({"a": nn.ModuleList(Block() for _ in range(2)), "b": nn.ModuleList(Block() for _ in range(2))})
    assert sum(count for count, _ in entries(two, 9)) == 4


def _trains(ranks, plan, prefetch):
    with grouped(2):
        sharded, _ = train_both(ranks, tower(5), plan, prefetch=prefetch)
    assert [len(unit.entries) for unit in sharded.units if unit.in_turn] == [2, 2]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("plan", ["3", "3-all", "3-disk"])
def test_a_tower_trains_as_in_one_process(world, plan, prefetch, n):
    world(n).run(_trains, plan, prefetch)


def _recomputed(ranks, reentrant):
    torch.manual_seed(5)
    with grouped(2):
        train_both(ranks, CheckpointedTower(reentrant, depth=5), "3")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_train_the_same(world, reentrant):
    world(2).run(_recomputed, reentrant)


def _released(ranks):
    """Which units are whole when the backward of each block begins, in a step whose order is known."""
    model = tower(6)
    with grouped(2):
        sharded, _, stepping = prepare(ranks, model, "3", prefetch=0)
    from shardwise.zero.unit import Weights

    seen = []

    def look(index, gradient):
        whole = [unit.state is not Weights.RELEASED for unit in sharded.units if unit.in_turn]
        seen.append((index, [number for number, here in enumerate(whole) if here]))

    def watch(module, args, output):
        output.register_hook(partial(look, list(model.blocks).index(module)))

    for block in model.blocks:
        block.register_forward_hook(watch)
    for _ in range(3):
        seen.clear()
        model(torch.randn(4, 5)).square().mean().backward()
        stepping.step()
        stepping.zero_grad()
    return seen


def test_a_unit_is_given_back_behind_the_backward_of_its_first_block(world):
    for seen in world(2).run(_released):
        assert [index for index, _ in seen] == [5, 4, 3, 2, 1, 0]
        for index, whole in seen:
            assert whole == [index // 2], seen
