"""Writing into the weights of a prepared model: `gathered(..., modify=True)`, and what scripts write by themselves."""

from __future__ import annotations

import copy

import pytest
import torch

import shardwise
from rig.engine import (
    PLANS,
    Block,
    Tower,
    inputs,
    largest_difference,
    loss_of,
    mine,
    prepare,
    tower,
    train_both,
    train_changed,
    weights_of,
)
from shardwise.errors import RankError, ReleasedParameterError, WriteError

pytestmark = pytest.mark.thinned(2)


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
    # What every rank has written counts without `modify` too.
    with shardwise.gathered(model.blocks[2]), torch.no_grad():
        model.blocks[2].up.weight.fill_(9)
    with shardwise.gathered(model.blocks[2]):
        assert (model.blocks[2].up.weight == 9).all()


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


# Weights that a script writes by itself, against plain torch. Each takes (model, step).


def _loaded(model, step):
    torch.manual_seed(step)
    model.load_state_dict({name: 0.1 * torch.randn_like(value.float()) for name, value in model.state_dict().items()})


def _clamped(model, step):
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def _assigned(model, step):
    for p in model.parameters():
        p.data = p.data.clamp(-0.05, 0.05)


def _in_place(model, step):
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(0.5)
        model.head.bias[1] = 3


def _by_a_view(model, step):
    with torch.no_grad():
        model.blocks[1].up.weight.view(-1)[3:7].zero_()


def _moved_nowhere(model, step):
    model.to("cpu")


WRITES = {
    "load_state_dict": _loaded,
    "p.data.clamp_": _clamped,
    "p.data =": _assigned,
    "in place": _in_place,
    "by a view": _by_a_view,
    "model.to the same": _moved_nowhere,
}


def _written(ranks, plan, precision, how):
    return train_changed(ranks, plan, precision, WRITES[how])


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", WRITES)
def test_what_a_script_writes_is_trained_from(world, how, plan, precision):
    # Written weights are of order 1 at most, and 16 bits leave 3 digits of them, in the masters as well.
    for difference in world(2).run(_written, plan, precision, how):
        assert difference <= (1e-6 if precision == "no" else 3e-2)


def _on_one_rank(ranks, plan):
    model = tower()
    sharded, _, _ = prepare(ranks, model, plan)
    before = weights_of(sharded)
    with pytest.raises(WriteError, match=r"on rank 1.*modify=True"), shardwise.gathered(model), torch.no_grad():
        model.head.weight.fill_(4) if ranks.rank == 1 else None
    if sharded.plan.parameter.sharded:
        assert all(torch.equal(value, before[name]) for name, value in weights_of(sharded).items())


@pytest.mark.parametrize("plan", ["1", "3", "3-all"])
def test_what_one_rank_writes_is_an_error_on_all(world, plan):
    world(2).run(_on_one_rank, plan)


REFUSED = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "another shape": lambda model: setattr(model.head.weight, "data", torch.zeros(2, 2)),
}


def _refused(ranks, plan, how):
    model = tower()
    _, _, stepping = prepare(ranks, model, plan)
    with pytest.raises((WriteError, ReleasedParameterError)) as caught:
        REFUSED[how](model)
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    stepping.step()
    return str(caught.value)


@pytest.mark.parametrize("plan", ["0", "2", "3"])
@pytest.mark.parametrize("how", REFUSED)
def test_what_would_leave_the_engine_is_refused(world, how, plan):
    for text in world(2).run(_refused, plan, how):
        assert "weight" in text


class NormalisingBlocks(Tower):
    """A block's forward writes a weight: in place, or through `data`, which nothing counts."""

    def __init__(self, how):
        super().__init__()
        self.blocks[1] = NormalisingBlock(how)


class NormalisingBlock(Block):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        with torch.no_grad():
            (self.up.weight if self.how == "in place" else self.up.weight.data).div_(self.up.weight.norm())
        return super().forward(x)


def _in_forward(ranks, plan, precision):
    torch.manual_seed(5)
    tolerance = 1e-6 if precision == "no" else 3e-2
    train_both(ranks, NormalisingBlocks("in place"), plan, steps=4, precision=precision, tolerance=tolerance)


@pytest.mark.parametrize("plan", ["0", "1", "2", "3", "3-all"])
def test_a_forward_may_write_its_weights(world, plan):
    world(2).run(_in_forward, plan, "no")


def _through_data_in_forward(ranks):
    torch.manual_seed(5)
    model = NormalisingBlocks("data")
    _, _, stepping = prepare(ranks, model, "3")
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    with pytest.raises(WriteError, match=r"blocks\.1\.up\.weight was written through `data`"):
        stepping.step()


def test_a_write_that_nothing_counts_is_told_at_the_step(world):
    world(2).run(_through_data_in_forward)
