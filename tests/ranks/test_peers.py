"""Ranks that copy each other's shards: the fences keep readers and writers apart.

A CPU has no symmetric memory. Here files in memory that all ranks map stand in for it: a copy is done when it returns, so what
is tested is who may read and write when, with one rank or the other late at every gather and every step.
"""

from __future__ import annotations

import copy
import tempfile
import time
import uuid
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch

from rig.engine import inputs, loss_of, mine, prepare, shard, tower, trained, weights_of
from shardwise.errors import PrepareError
from shardwise.offload import peers
from shardwise.ranks.group import Group
from shardwise.zero.unit import Unit


def _mapped(ranks, _, numel, dtype):
    path = Path(tempfile.gettempdir()) / f"shardwise-peers-{uuid.uuid4().hex}"
    paths = ranks.broadcast_object(None if ranks.rank else [f"{path}-{r}" for r in range(ranks.world_size)])
    torch.from_file(paths[ranks.rank], shared=True, size=numel, dtype=dtype).zero_()
    ranks.barrier()
    found = [torch.from_file(p, shared=True, size=numel, dtype=dtype) for p in paths]
    ranks.barrier()
    Path(paths[ranks.rank]).unlink()
    return found


@contextmanager
def mapped_files(ranks, late=-1):
    """Inside, shards are shared through files. late: the rank that is slow at every gather and step; -1 for none."""
    before = peers._why_not, peers._trial, Group.map_shared, peers.MIN_SHARD_NBYTES, Unit.gather
    peers._why_not = peers._trial = lambda ranks: None
    Group.map_shared, peers.MIN_SHARD_NBYTES = partialmethod(partial(_mapped, ranks)), 1

    def gather(unit, *, exact=True):
        if unit._engine.ranks.rank == late:
            time.sleep(0.003)
        before[4](unit, exact=exact)

    Unit.gather = gather
    try:
        yield
    finally:
        peers._why_not, peers._trial, Group.map_shared, peers.MIN_SHARD_NBYTES, Unit.gather = before


def _model(tuning):
    model = tower()
    if tuning == "frozen":
        for block in model.blocks:
            block.up.requires_grad_(False)
    return model


def _losses_and_weights(ranks, model, gather_with, accumulate, **settings):
    sharded, _, stepping = prepare(ranks, model, gather_with=gather_with, **settings)
    losses = []
    for step, batch in enumerate(inputs(6)):
        sharded.sync_gradients = (step + 1) % accumulate == 0
        loss = loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size))
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        losses.append(loss.item())
    weights = weights_of(sharded)
    counts = ranks.counts.copy()
    sharded.release()
    return losses, weights, counts


def trains_as_with_collectives(ranks, tuning, precision, accumulate, late):
    model = _model(tuning)
    settings = {"precision": precision, "accumulate": accumulate}
    expected = _losses_and_weights(ranks, copy.deepcopy(model), "nccl", **settings)
    ranks.counts.clear()
    with mapped_files(ranks, late):
        found = _losses_and_weights(ranks, model, "copy_engine", **settings)
    assert found[0] == expected[0]
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())
    steps = 6 // accumulate
    assert found[2]["all_gather"] == 0
    assert found[2]["fence"] == 2 * steps


@pytest.mark.parametrize("late", [-1, 0, 1])
@pytest.mark.parametrize(
    ("tuning", "precision", "accumulate"), [("full", "no", 1), ("full", "bf16", 2), ("frozen", "bf16", 1)]
)
def test_training_gives_the_bits_of_a_run_with_collectives(world, tuning, precision, accumulate, late):
    world(2).run(trains_as_with_collectives, tuning, precision, accumulate, late)


def test_three_ranks(world):
    world(3).run(trains_as_with_collectives, "full", "bf16", 1, 2)


def frozen_need_no_fence(ranks):
    model = tower()
    for parameter in trained(model)[:-1]:
        parameter.requires_grad_(False)
    with mapped_files(ranks):
        sharded, _, stepping = prepare(ranks, model, gather_with="copy_engine", whole_adapters=True)
    ranks.counts.clear()
    loss_of(sharded.model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    stepping.step()
    assert ranks.counts["fence"] == 0
    assert ranks.counts["all_gather"] == 1  # of the trained weights, which stay whole, after the step


def test_frozen_weights_need_no_fence(world):
    world(2).run(frozen_need_no_fence)


def modified_weights_reach_every_rank(ranks, late):
    with mapped_files(ranks, late):
        sharded = shard(ranks, _model("frozen"), gather_with="copy_engine")
        for value in (1.0, 2.0, 3.0):
            weight = sharded.model.blocks[1].up.weight
            with sharded.gathered([weight], modify=True), torch.no_grad():
                weight.fill_(value if ranks.rank == 0 else -1.0)
            assert bool((weights_of(sharded)["blocks.1.up.weight"] == value).all())
        sharded.release()
    assert bool((sharded.model.blocks[1].up.weight == 3.0).all())


@pytest.mark.parametrize("late", [0, 1])
def test_what_is_written_while_gathered_reaches_every_rank(world, late):
    world(2).run(modified_weights_reach_every_rank, late)


def copy_engines_are_refused_on_cpus(ranks):
    with pytest.raises(PrepareError, match=r"gather_with: copy_engine is not possible here: the ranks run on CPUs"):
        shard(ranks, tower(), gather_with="copy_engine")
    assert shard(ranks, tower(), gather_with="auto").engine.peers is None


def test_copy_engines_are_refused_where_there_are_none(world):
    world(2).run(copy_engines_are_refused_on_cpus)


def turn_is_widened(ranks):
    expected = _losses_and_weights(ranks, tower(), "nccl", 1)
    sharded, _, stepping = prepare(ranks, tower())
    nbytes = sum(part.whole_nbytes for part in sharded.units[1].parts)
    losses, counts = [], []
    for step, batch in enumerate(inputs(6)):
        if step == 2:
            assert sharded.schedule.widen_turn(2 * nbytes) == 2
        ranks.counts.clear()
        loss = loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size))
        loss.backward()
        losses.append(loss.item())
        counts.append(ranks.counts["all_gather"])
        stepping.step()
        stepping.zero_grad()
        if step == 3:  # a forward whose backward does not come
            loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size))
    weights = weights_of(sharded)
    assert losses == expected[0]
    assert all(torch.equal(value, expected[1][name]) for name, value in weights.items())
    assert counts[1] - counts[2] == 2
    assert counts[5] == counts[2]


def test_more_units_stay_gathered_over_the_turn(world):
    world(2).run(turn_is_widened)


def budget_keeps_units_gathered(ranks, late):
    expected = _losses_and_weights(ranks, _model("frozen"), "nccl", 1, precision="bf16")
    ranks.counts.clear()
    with mapped_files(ranks, late):
        found = _losses_and_weights(
            ranks, _model("frozen"), "copy_engine", 1, precision="bf16", gpu_memory_budget=1 << 30
        )
    assert found[0] == expected[0]
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())


@pytest.mark.parametrize("late", [0, 1])
def test_a_memory_budget_changes_no_bit(world, late):
    world(2).run(budget_keeps_units_gathered, late)
