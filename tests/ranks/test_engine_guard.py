"""A released weight speaks: reading it anywhere gives one error that names it and says how to read it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from rig.engine import inputs, loss_of, mine, prepare, shard, tower

# Each row is one way to read, spelled as a user spells it.
# ruff: noqa: PLW0108
READS = {
    "sum": lambda p: p.sum(),
    "index": lambda p: p[0],
    "item": lambda p: p.view(-1)[0].item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.detach().numpy(),
    "add": lambda p: p + 1,
    "right add": lambda p: 1 + p,
    "matmul": lambda p: torch.ones(1, p.shape[0]) @ p,
    "functional": lambda p: nn.functional.linear(torch.ones(2, p.shape[1]), p),
    "clone": lambda p: p.clone(),
    "detach and read": lambda p: p.detach().sum(),
    "data and read": lambda p: p.data.sum(),
    "to": lambda p: p.to(torch.float64),
    "cpu and read": lambda p: p.cpu().sum(),
    "stack": lambda p: torch.stack([p, p]),
    "equal": lambda p: torch.equal(p, p),
    "out": lambda p: torch.add(torch.ones(1), 1, out=p.data),
    "fill": lambda p: nn.init.ones_(p),
    "copy_ from": lambda p: torch.zeros(p.shape).copy_(p),
    "copy_ into": lambda p: p.data.copy_(torch.zeros(p.shape)),
    "save": lambda p: torch.save(p, io.BytesIO()),
    "save in a dict": lambda p: torch.save({"w": p}, io.BytesIO()),
    "deepcopy": lambda p: copy.deepcopy(p),
    "norm": lambda p: torch.linalg.vector_norm(p),
    "foreach": lambda p: torch._foreach_norm([p]),
    "format": lambda p: f"{p.sum():.2f}",
    "bool": lambda p: bool((p > 0).any()),
    "iter": lambda p: list(p),
}


def _read(ranks, how, plan):
    from shardwise.errors import ReleasedParameterError

    model = tower()
    shard(ranks, model, plan)
    with pytest.raises(ReleasedParameterError) as caught:
        READS[how](model.blocks[1].up.weight)
    return str(caught.value)


@pytest.mark.parametrize("how", READS)
def test_reading_a_released_weight_raises_and_names_it(world, how):
    for text in world(2).run(_read, how, "3"):
        assert "blocks.1.up.weight" in text
        assert "gathered" in text


def _read_offloaded(ranks):
    return [_read(ranks, how, "3-all") for how in ("sum", "save", "data and read")]


def test_a_single_rank_with_offloaded_weights_is_guarded_too(world):
    world(1).run(_read_offloaded)


def _save_whole_model(ranks):
    from shardwise.errors import ReleasedParameterError

    model = tower()
    shard(ranks, model, "3")
    for save in (lambda: torch.save(model.state_dict(), io.BytesIO()), lambda: copy.deepcopy(model)):
        with pytest.raises(ReleasedParameterError):
            save()


def test_a_released_model_is_never_saved_empty(world):
    world(2).run(_save_whole_model)


def _facts(ranks):
    """What a script asks of parameters without reading them is answered as always."""
    model = tower()
    plain = {name: (p.shape, p.dtype, p.numel()) for name, p in model.named_parameters()}
    weight = model.blocks[1].up.weight
    sharded, _, stepping = prepare(ranks, model, "3")
    assert {name: (p.shape, p.dtype, p.numel()) for name, p in model.named_parameters()} == plain
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(n for _, _, n in plain.values())
    assert model.blocks[1].up.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert weight.device.type == "cpu"
    assert weight.grad is None
    assert weight.is_leaf
    assert weight.size(0) == 20
    assert weight.ndim == weight.dim() == 2
    assert weight.element_size() == 4
    assert weight in {weight}
    assert next(model.parameters()).dtype == torch.float32
    assert "blocks.1.up.weight" in repr(weight)
    assert "released" in repr(weight)
    str(model)
    model.train().eval().train()
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    stepping.step()
    model.zero_grad()
    assert model.blocks[1].up.weight is weight
    assert sharded.model is model


def test_facts_about_a_released_weight_are_answered(world):
    world(2).run(_facts)


def _inside(ranks, plan):
    from shardwise.errors import ReleasedParameterError

    model = tower()
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharded = shard(ranks, model, plan)
    with sharded.gathered():
        for name, p in model.named_parameters():
            assert type(p) is nn.Parameter
            assert torch.equal(p, whole[name])
        with sharded.gathered():  # nested: the inner exit must not release what the outer one holds
            pass
        model.blocks[1].up.weight.sum()
    with pytest.raises(ReleasedParameterError):
        model.blocks[1].up.weight.sum()
    with sharded.gathered([model.blocks[1].up.weight]):
        model.blocks[1].up.weight.sum()
        with pytest.raises(ReleasedParameterError):
            model.blocks[2].up.weight.sum()
    with pytest.raises(ValueError, match="mine"), sharded.gathered():
        raise ValueError("mine")
    with pytest.raises(ReleasedParameterError):
        model.blocks[1].up.weight.sum()


@pytest.mark.parametrize("plan", ["3", "3-all"])
def test_gathered_makes_weights_readable_inside_and_only_there(world, plan):
    world(2).run(_inside, plan)


def _module_used_alone(ranks):
    """A submodule called outside its model's forward: it gathers for itself, or says so; it never reads garbage."""
    model = tower()
    expected = model.blocks[1](torch.ones(2, 12)).detach()
    shard(ranks, model, "3")
    from shardwise.errors import ReleasedParameterError

    x = torch.ones(2, 12)
    with torch.no_grad():
        assert torch.equal(model.blocks[1](x), expected)
    with pytest.raises(ReleasedParameterError, match=r"blocks\.1\.up"):
        model.blocks[1].up(x)


def test_a_block_called_alone_gathers_and_a_part_of_it_says_why_not(world):
    world(2).run(_module_used_alone)


def _twice(ranks):
    from shardwise.errors import PrepareError

    model = tower()
    shard(ranks, model, "3")
    for again in (model, model.blocks[0], nn.Sequential(model)):
        with pytest.raises(PrepareError, match="already"):
            shard(ranks, again, "3")


def test_a_model_prepared_twice_is_refused_on_every_rank(world):
    world(2).run(_twice)


def _unequal_models(ranks):
    from shardwise.errors import ShardwiseError

    with pytest.raises(ShardwiseError) as caught:
        shard(ranks, tower(depth=2 + ranks.rank), "3")
    return str(caught.value)


def test_models_that_differ_between_ranks_are_refused_on_every_rank(world):
    texts = world(2).run(_unequal_models)
    assert any("blocks.2" in text or "differs" in text for text in texts)
