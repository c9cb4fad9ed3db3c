"""Writing into the weights of a prepared model: `gathered(..., modify=True)`."""

from __future__ import annotations

import copy

import pytest
import torch

import shardwise
from rig.engine import PLANS, inputs, largest_difference, loss_of, mine, prepare, tower, weights_of
from shardwise.errors import RankError, ReleasedParameterError


def _edit(model, factor):
    with torch.no_grad():
        model.blocks[1].up.weight[3:9] = factor
        model.head.bias.mul_(factor)
        model.first.weight.data.add_(1)


def _write(ranks, plan, precision, frozen):
    model = tower()
    for parameter in model.blocks[1].parameters() if frozen else ():
        parameter.requires_grad_(False)
    reference = copy.deepcopy(model)
    sharded, _, stepping = prepare(ranks, model, plan, precision=precision, whole_adapters=False)
    exact = sharded.state_dict()
    with shardwise.gathered(model, modify=True):
        _edit(model, 2.0 + ranks.rank)  # what the other ranks write does not count
    _edit(reference, 2.0)
    state = sharded.state_dict()
    if ranks.rank == 0 and precision == "bf16":
        # Masters that nobody touched keep the digits that bf16 does not have.
        assert torch.equal(state["blocks.0.up.weight"], exact["blocks.0.up.weight"])
        assert not torch.equal(state["blocks.0.up.weight"], state["blocks.0.up.weight"].bfloat16().float())
        assert (state["blocks.1.up.weight"][3:9] == 2).all()
        rest = [row for row in range(20) if not 3 <= row < 9]
        assert torch.equal(state["blocks.1.up.weight"][rest], exact["blocks.1.up.weight"][rest])
    if precision == "no":
        assert largest_difference(weights_of(sharded), reference) == 0
        plain = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=3e-3, eps=1e-4)
        for step, batch in enumerate(inputs(3)):
            for rank in range(ranks.world_size):
                (loss_of(reference, mine(batch, rank, ranks.world_size), rank, step) / ranks.world_size).backward()
            plain.step()
            plain.zero_grad()
            loss_of(model, mine(batch, ranks.rank, ranks.world_size), ranks.rank, step).backward()
            stepping.step()
            stepping.zero_grad()
        assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("plan", PLANS)
def test_what_rank_0_writes_is_in_shards_and_masters(world, plan, precision, frozen):
    world(2).run(_write, plan, precision, frozen)


def _parts(ranks):
    model = tower()
    prepare(ranks, model, "3")
    before = ranks.counts["all_gather"]
    with shardwise.gathered(model.blocks[1]):
        assert model.blocks[1].up.weight.shape == (20, 12)
        assert model.blocks[1].up.weight.sum().isfinite()
        with pytest.raises(ReleasedParameterError):
            model.blocks[0].up.weight.sum()
    assert ranks.counts["all_gather"] == before + 1
    with shardwise.gathered(model.blocks[2].up.weight, modify=True), torch.no_grad():
        model.blocks[2].up.weight.fill_(3)
    with shardwise.gathered([model.blocks[2].up.weight, model.head.weight]):
        assert (model.blocks[2].up.weight == 3).all()
        assert model.head.weight.sum().isfinite()
    # What is written without `modify` is lost.
    with shardwise.gathered(model.blocks[2]), torch.no_grad():
        model.blocks[2].up.weight.fill_(9)
    with shardwise.gathered(model.blocks[2]):
        assert (model.blocks[2].up.weight == 3).all()


def test_a_module_a_parameter_and_several_can_be_gathered(world):
    world(2).run(_parts)


def _write_or_fail(ranks, model):
    with shardwise.gathered(model, modify=True):
        if ranks.rank == 1:
            raise ZeroDivisionError("mine")
        model.head.weight.data.fill_(4)


def _fails(ranks):
    model = tower()
    sharded, _, _ = prepare(ranks, model, "3")
    before = weights_of(sharded)
    with pytest.raises((ZeroDivisionError, RankError)) as caught:
        _write_or_fail(ranks, model)
    after = weights_of(sharded)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    return str(caught.value)


def test_an_error_while_writing_is_every_ranks_and_nothing_is_written(world):
    assert world(2).run(_fails) == ["rank 1 failed: ZeroDivisionError: mine", "mine"]
