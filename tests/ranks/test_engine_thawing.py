"""What is trained may change at any boundary between steps, with an optimizer that knew of it or one that did not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rig.engine import (
    inputs,
    largest_difference,
    loss_of,
    mine,
    plain_step,
    prepare,
    shard,
    step_both,
    tower,
    trained,
    weights_of,
)
from shardwise.errors import OptimizerError, PrepareError, RankError

pytestmark = pytest.mark.thinned(3)

PLACES = [
    *(("0", 1), ("0", 3), ("1", 2), ("2", 3), ("3", 1), ("3", 2), ("3", 3)),
    *(("2-opt", 2), ("3-all", 1), ("3-all", 2), ("3-disk", 2)),
]


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4)


def _adagrad(parameters):
    return torch.optim.Adagrad(parameters, lr=3e-3, initial_accumulator_value=0.1)


def _all(model):
    return list(model.parameters())


def _freeze(model, *modules):
    for module in modules:
        module.requires_grad_(False)


# Each is called before a step's forward with (model, optimizer, step), and begins with what `FROZEN` says.


def _head_first(model, optimizer, step):
    """The head is trained first, then block by block from the top."""
    if step == 2:
        model.blocks[2].requires_grad_(True)
    if step == 3:
        model.blocks[1].requires_grad_(True)
        model.first.requires_grad_(True)
    if step == 5:
        model.blocks[0].requires_grad_(True)


def _head_last(model, optimizer, step):
    if step == 2:
        model.head.requires_grad_(True)


def _part_of_a_block(model, optimizer, step):
    if step == 1:
        model.blocks[1].up.weight.requires_grad_(True)
    if step == 4:
        model.blocks[1].up.bias.requires_grad_(True)
        model.blocks[1].down.requires_grad_(True)


def _there_and_back(model, optimizer, step):
    for number, block in enumerate(model.blocks):
        block.requires_grad_(step % 3 == number)


def _in_a_group(model, optimizer, step):
    if step == 2:
        model.head.requires_grad_(True)
        optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.01})


def _in_a_group_later(model, optimizer, step):
    if step == 1:
        model.head.requires_grad_(True)
    if step == 3:
        optimizer.add_param_group({"params": list(model.head.named_parameters()) and list(model.head.parameters())})


def _frozen_group(model, optimizer, step):
    if step == 1:
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.05})
    if step == 3:
        model.head.requires_grad_(True)


# what is frozen at prepare, and whether the optimizer knows all parameters
CASES = {
    "head first": (_head_first, lambda m: [m.first, *m.blocks], True),
    "head last": (_head_last, lambda m: [m.head], True),
    "part of a block": (_part_of_a_block, lambda m: [m.blocks[1]], True),
    "there and back": (_there_and_back, lambda m: [m.blocks[1], m.blocks[2]], True),
    "in a group": (_in_a_group, lambda m: [m.head], False),
    "in a group later": (_in_a_group_later, lambda m: [m.head], False),
    "in a frozen group": (_frozen_group, lambda m: [m.head], False),
}


def _train(ranks, plan, case, make, *, micro=1, steps=7, **settings):
    script, frozen, knows = CASES[case]
    model = tower()
    _freeze(model, *frozen(model))
    reference = copy.deepcopy(model)
    chosen = _all if knows else trained
    plain = make(chosen(reference))
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda p: make(chosen(model)), **settings)
    for step, batch in enumerate(inputs(steps)):
        script(reference, plain, step)
        script(model, stepping, step)
        for part in range(micro):
            sharded.sync_gradients = part == micro - 1
            piece = batch[part::micro]
            plain_step(reference, piece, ranks.world_size, step, loss_of)
            loss_of(model, mine(piece, ranks.rank, ranks.world_size)).backward()
        plain.step()
        plain.zero_grad()
        stepping.step()
        stepping.zero_grad()
        assert largest_difference(weights_of(sharded), reference) <= 2e-6, step
    return sharded, stepping, plain, reference


def _trains(ranks, plan, case, **settings):
    _train(ranks, plan, case, _sgd, **settings)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("plan", "n"), PLACES)
def test_a_thawed_weight_is_trained(world, plan, n, case):
    world(n).run(_trains, plan, case, timeout_s=60)


def _its_states_begin_with_it(ranks, plan, case):
    _, stepping, plain, _ = _train(ranks, plan, case, _adamw)
    found, expected = stepping.state_dict(), plain.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(found["state"][number][name], value, rtol=1e-5, atol=1e-6)
    assert [g["params"] for g in found["param_groups"]] == [g["params"] for g in expected["param_groups"]]


@pytest.mark.parametrize("case", ["head first", "in a group", "there and back"])
@pytest.mark.parametrize(("plan", "n"), [("0", 2), ("2", 2), ("3", 2), ("3-all", 2), ("3-disk", 1)])
def test_its_states_begin_with_it(world, plan, n, case):
    """AdamW counts steps by parameter; the whole dictionary is torch's."""
    world(n).run(_its_states_begin_with_it, plan, case, timeout_s=60)


def _states_that_a_constructor_made_come_along(ranks, plan):
    _, stepping, plain, _ = _train(ranks, plan, "head first", _adagrad)
    assert stepping.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


@pytest.mark.parametrize(("plan", "n"), [("0", 2), ("3", 2), ("3-all", 2)])
def test_states_that_a_constructor_made_come_along(world, plan, n):
    world(n).run(_states_that_a_constructor_made_come_along, plan, timeout_s=60)


@pytest.mark.parametrize("case", ["head first", "in a group later", "there and back"])
@pytest.mark.parametrize(("plan", "n"), [("0", 2), ("1", 2), ("2", 3), ("3", 2), ("3-all", 2)])
def test_thawed_while_gradients_are_accumulated(world, plan, n, case):
    world(n).run(_trains, plan, case, micro=3, timeout_s=60)


def _under_clipping_and_whole_adapters(ranks, whole, clipping):
    script, frozen, _ = CASES["head first"]
    model = tower()
    _freeze(model, *frozen(model))
    reference = copy.deepcopy(model)
    plain = _sgd(_all(reference))
    sharded, _, stepping = prepare(
        ranks, model, "3", optimizer=lambda p: _sgd(_all(model)), clipping=clipping, whole_adapters=whole
    )
    for step, batch in enumerate(inputs(6)):
        script(reference, plain, step)
        script(model, stepping, step)
        plain_step(reference, batch, ranks.world_size, step, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        if clipping is not None:
            nn.utils.clip_grad_norm_(reference.parameters(), clipping)
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
        assert largest_difference(weights_of(sharded), reference) <= 2e-6, step


@pytest.mark.parametrize("whole", [True, False, "auto"])
@pytest.mark.parametrize("clipping", [None, 0.05])
def test_under_clipping_and_whole_adapters(world, whole, clipping):
    """The norm counts what was thawed: plain torch with `clip_grad_norm_` of all parameters."""
    world(2).run(_under_clipping_and_whole_adapters, whole, clipping, timeout_s=60)


def _an_optimizer_made_over_thawed_weights(ranks, plan):
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    _freeze(model, model.head, model.blocks[0])
    reference = copy.deepcopy(model)
    plain = [_sgd(trained(reference))]
    sharded, _, first = prepare(ranks, model, plan, optimizer=_sgd)
    stepping = [first]
    for step, batch in enumerate(inputs(6)):
        if step == 2:
            for m, optimizers in ((reference, plain), (model, stepping)):
                m.head.requires_grad_(True)
                optimizers.append(_adamw(m.head.parameters()))
            ShardedOptimizer(stepping[-1], [sharded])
        if step == 4:
            for m, optimizers in ((reference, plain), (model, stepping)):
                m.blocks[0].requires_grad_(True)
                optimizers[:] = [_sgd(m.parameters())]
            ShardedOptimizer(stepping[-1], [sharded])
        plain_step(reference, batch, ranks.world_size, step, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in (*plain, *stepping):
            optimizer.step()
        for optimizer in (*plain, *stepping):
            optimizer.zero_grad()
        assert largest_difference(weights_of(sharded), reference) <= 2e-6, step


@pytest.mark.parametrize(("plan", "n"), [("1", 2), ("3", 2), ("3-all", 1)])
def test_an_optimizer_made_over_thawed_weights(world, plan, n):
    """A second optimizer for what the first one does not hold, and a fresh one for everything."""
    world(n).run(_an_optimizer_made_over_thawed_weights, plan, timeout_s=60)


def _thawed_weights_before_any_step(ranks, plan):
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    _freeze(model, model.head)
    reference = copy.deepcopy(model)
    sharded = shard(ranks, model, plan)
    for m in (reference, model):
        m.head.requires_grad_(True)
    plain, stepping = _sgd(reference.parameters()), _sgd(model.parameters())
    ShardedOptimizer(stepping, [sharded])
    for batch in inputs(3):
        step_both(ranks, batch, (reference, plain), (model, stepping))
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize(("plan", "n"), [("0", 2), ("3", 2)])
def test_thawed_weights_before_any_step(world, plan, n):
    """requires_grad is set between prepare of the model and that of the optimizer."""
    world(n).run(_thawed_weights_before_any_step, plan, timeout_s=60)


def _states_of_frozen_weights_are_kept(ranks, plan, how):
    _, _, plain, reference = _train(ranks, plan, "head first", _adamw)
    saved, weights = plain.state_dict(), reference.state_dict()
    model, other = tower(), tower()
    for m in (model, other):
        m.load_state_dict(weights)
        _freeze(m, m.blocks[1])
    plain = _adamw(_all(other))
    plain.load_state_dict(copy.deepcopy(saved))
    if how == "by a frozen one":
        made = _adamw(_all(model))
        made.load_state_dict(copy.deepcopy(saved))
        sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda p: made)
    else:
        sharded, _, stepping = prepare(ranks, model, plan, optimizer=lambda p: _adamw(_all(model)))
        stepping.load_state_dict(copy.deepcopy(saved))
    assert stepping.state_dict()["state"].keys() == saved["state"].keys()
    for step, batch in enumerate(inputs(4)):
        for m in (model, other):
            m.blocks[1].requires_grad_(step > 1)
        plain_step(other, batch, ranks.world_size, step, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), other) <= 2e-6


@pytest.mark.parametrize("how", ["by a frozen one", "into a frozen one"])
@pytest.mark.parametrize(("plan", "n"), [("0", 1), ("3", 2), ("3-all", 2)])
def test_states_of_frozen_weights_are_kept(world, plan, n, how):
    """A dictionary of a run that trains more: its states wait for the day that the weights are thawed."""
    world(n).run(_states_of_frozen_weights_are_kept, plan, how, timeout_s=60)


def _ranks_that_differ_are_told(ranks):
    model = tower()
    _freeze(model, model.head)
    prepare(ranks, model, "3", optimizer=lambda p: _sgd(_all(model)))
    if ranks.rank:
        model.head.requires_grad_(True)
    with pytest.raises(
        PrepareError, match=r"head.weight, head.bias was set on rank 1 and not on rank 0|head.bias, head"
    ):
        loss_of(model, inputs(1)[0]).backward()


def test_ranks_that_differ_are_told(world):
    world(2).run(_ranks_that_differ_are_told, timeout_s=60)


def _a_group_that_does_not_fit_is_refused(ranks):
    model = tower()
    _freeze(model, model.head)
    sharded, _, stepping = prepare(ranks, model, "3", optimizer=_sgd)
    with pytest.raises(OptimizerError, match="parameter 0 of group 1 of this SGD"):
        stepping.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        stepping.add_param_group({"params": model.first.parameters()})
    with pytest.raises((TypeError, RankError), match="set"):
        stepping.add_param_group({"params": set(model.head.parameters())} if ranks.rank else {"params": {}})
    assert len(stepping.param_groups) == 1
    loss_of(model, inputs(1)[0]).backward()
    stepping.step()
    del sharded


def test_a_group_that_does_not_fit_is_refused(world):
    world(2).run(_a_group_that_does_not_fit_is_refused, timeout_s=60)


def _memory_of_frozen_states_is_that_of_one_number(ranks):
    model = tower()
    _freeze(model, model.head)
    _, driver, _ = prepare(ranks, model, "3", optimizer=lambda p: _adagrad(_all(model)))
    kept = [v for s in driver.states.dormant.values() for v in s.values()]
    assert kept
    assert all(value.untyped_storage().nbytes() <= 8 for value in kept if isinstance(value, torch.Tensor))


def test_memory_of_frozen_states_is_that_of_one_number(world):
    world(1).run(_memory_of_frozen_states_is_that_of_one_number, timeout_s=60)
