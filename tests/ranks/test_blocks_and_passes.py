"""Blocks that hold weights, around passes that an interrupt or a graph has left behind on one rank."""

from __future__ import annotations

import pytest
import torch

from rig.engine import inputs, mine, prepare, tower


def _interrupt(module, args):
    raise KeyboardInterrupt


def _interrupted_inside(ranks, block):
    sharded, _, stepping = prepare(ranks, tower(), "3", generation_memory_budget="auto")
    model, (x,) = sharded.model, inputs(1)
    expected = tower()(x)
    with sharded.generation() if block == "generation" else sharded.gathered(), torch.enable_grad():
        if ranks.rank == 0:
            handle = model.blocks[1].register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
            handle.remove()
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)
    model(mine(x, ranks.rank, ranks.world_size)).square().mean().backward()
    stepping.step()


@pytest.mark.parametrize("block", ["gathered", "generation"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_rank_that_was_interrupted_where_all_is_held_asks_nobody(world, n, block):
    world(n).run(_interrupted_inside, block, timeout_s=20)


def _graph_of_other_units(ranks):
    sharded, _, _ = prepare(ranks, tower(), "3")
    model, (x,) = sharded.model, inputs(1)
    blocks = list(model.blocks)
    expected = {name: value.clone() for name, value in tower().state_dict().items()}
    hidden = torch.randn(2, 12, requires_grad=True)
    energy = blocks[ranks.rank](hidden).square().sum()
    (force,) = torch.autograd.grad(energy, hidden, create_graph=True)
    for _ in range(2):
        with sharded.gathered():
            for name, value in model.state_dict().items():
                assert torch.equal(value, expected[name]), name
    force.square().sum().backward()
    with sharded.gathered():
        pass
    with torch.no_grad():
        assert torch.allclose(model(x), tower()(x), atol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_whose_graphs_keep_other_units_gather_the_same_ones(world, n):
    world(n).run(_graph_of_other_units, timeout_s=20)
