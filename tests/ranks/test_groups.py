"""Which ranks divide a model, and which hold the same part of it, is a value of `Ranks`: the engine asks nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rig.engine import inputs, largest_difference, loss_of, mine, plain_step, prepare, tower, train_both, weights_of


def _today(ranks):
    rank = ranks.rank
    whole, out = torch.zeros(4), torch.zeros(2)
    ranks.shards.all_gather(whole, torch.full((2,), float(rank)))
    ranks.shards.reduce_scatter(torch.arange(4.0) + rank, out)
    ranks.copies.all_reduce_gradient(out)
    averaged = torch.tensor([float(rank)])
    ranks.shards.all_reduce_gradient(averaged)
    ranks.shards.fence()
    sizes = (ranks.shards.rank, ranks.shards.size, ranks.copies.rank, ranks.copies.size)
    return sizes, whole.tolist(), out.tolist(), averaged.item(), dict(ranks.counts)


def test_two_ranks_divide_one_copy_and_each_is_its_own_copy(world):
    counts = {"all_gather": 1, "reduce_scatter": 1, "all_reduce_gradient": 1, "fence": 1}
    for rank, found in enumerate(world(2).run(_today)):
        mine = [0.5, 1.5] if rank == 0 else [2.5, 3.5]
        assert found == ((rank, 2, 0, 1), [0.0, 0.0, 1.0, 1.0], mine, 0.5, counts)


def _two_by_two(ranks):
    """These ranks, in pairs that each hold a copy: 0 and 1, 2 and 3; 0 and 2 hold the same shards, and so do 1 and 3."""
    found = ranks.divided(2)
    found.shards.counts.clear()
    found.copies.counts.clear()
    return found


def _trains(ranks, plan):
    grouped = _two_by_two(ranks)
    sharded, _ = train_both(grouped, tower(), plan)
    parts = {unit.trained.region.numel / unit.trained.buffer.layout.numel for unit in sharded.units}
    return parts, dict(ranks.counts), dict(grouped.shards.counts), dict(grouped.copies.counts)


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_pairs_that_divide_a_copy_train_as_one_process(world, plan):
    """Nothing but the groups says so: each rank steps half of the masters, and gradients meet over pairs, then over copies."""
    for parts, everyone, shards, copies in world(4).run(_trains, plan):
        if plan == "0":  # nothing is divided: one reduction over all
            assert (parts, shards, copies) == ({1.0}, {}, {})
            assert everyone["all_reduce_gradient"] > 0
            continue
        assert parts == {0.5}
        assert shards["reduce_scatter"] > 0
        assert copies == {"all_reduce_gradient": shards["reduce_scatter"]}
        assert everyone.keys().isdisjoint({"all_gather", "reduce_scatter", "all_reduce_gradient"})


def _clips(ranks, plan):
    grouped, reference, model = _two_by_two(ranks), tower(), tower()
    make = partial(torch.optim.SGD, lr=0.1)
    plain = make(reference.parameters())
    sharded, stepper, stepping = prepare(grouped, model, plan, optimizer=make, clipping=0.01)
    norms = []
    for step, batch in enumerate(inputs(3)):
        plain_step(reference, batch, 4, step, loss_of)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        plain.step()
        plain.zero_grad()
        loss_of(model, mine(batch, ranks.rank, 4), ranks.rank, step).backward()
        norms.append((float(expected), float(stepper.clip_norm(model.parameters(), 1e6))))
        stepping.step()
        stepping.zero_grad()
    return norms, largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_pairs_that_divide_a_copy_clip_by_the_norm_of_one_copy(world, plan):
    """Both the norm that a script asks for, and the one of the message of a step, over which all ranks add up."""
    for norms, difference in world(4).run(_clips, plan):
        for expected, found in norms:
            assert found == pytest.approx(expected, rel=1e-5)
        assert difference <= 1e-6
