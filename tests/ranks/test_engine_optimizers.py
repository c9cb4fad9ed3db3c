"""Any elementwise torch optimizer steps on shards as it does on whole weights; the others are refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from rig.engine import PLANS, inputs, loss_of, mine, plain_step, prepare, shard, step_both, tower, train_both, trained

pytestmark = pytest.mark.thinned(2)

# eps above rounding noise where there is one, see tests/parity/training.py.
ELEMENTWISE = {
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, eps=1e-4, weight_decay=0.01),
    "Adam-amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, eps=1e-4, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, eps=1e-4),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD-nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-4, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-4, initial_accumulator_value=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3, eps=1e-4),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-3, eps=1e-4),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-3, eps=1e-4),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, eps=1e-4),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}


def _steps_like_one_process(ranks, name, plan):
    train_both(ranks, tower(), plan, optimizer=ELEMENTWISE[name], steps=8)


@pytest.mark.parametrize("plan", ["1", "3", "3-all"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_optimizer_steps_as_in_one_process(world, name, plan):
    world(2).run(_steps_like_one_process, name, plan)


def _groups(ranks, plan, foreach):
    model = tower()
    reference = copy.deepcopy(model)

    def build(model):
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        first = [p for name, p in model.named_parameters() if name == "first.weight"]
        rest = [p for name, p in model.named_parameters() if name.endswith("weight") and name != "first.weight"]
        groups = [
            {"params": rest, "weight_decay": 0.1},
            {"params": biases, "lr": 1e-2, "weight_decay": 0.0},
            {"params": first, "lr": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=2e-3, eps=1e-4, foreach=foreach)

    from rig.engine import largest_difference, weights_of
    from shardwise.step.optimizer import ShardedOptimizer

    plain, stepping = build(reference), build(model)
    decay = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.7**step) for o in (plain, stepping)]
    sharded = shard(ranks, model, plan)
    ShardedOptimizer(stepping, [sharded])
    assert [group["weight_decay"] for group in stepping.param_groups] == [0.1, 0.0, 0.01]
    for step, batch in enumerate(inputs(6)):
        plain_step(reference, batch, ranks.world_size, step, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer, scheduler in ((plain, decay[0]), (stepping, decay[1])):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        # A user may turn a knob of a group at any time.
        for optimizer in (plain, stepping):
            optimizer.param_groups[1]["weight_decay"] = 0.01 * step
    assert [g["lr"] for g in stepping.param_groups] == [g["lr"] for g in plain.param_groups]
    assert largest_difference(weights_of(sharded), reference) <= 1e-6
    with sharded.gathered():
        assert torch.equal(dict(model.named_parameters())["first.weight"], tower().first.weight)


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("plan", PLANS)
def test_parameter_groups_and_schedulers_act_as_the_user_wrote_them(world, plan, foreach):
    world(2).run(_groups, plan, foreach)


def _same_object(ranks):
    model = tower()
    sharded, stepper, stepping = prepare(ranks, model, "3")
    from shardwise.step.optimizer import find_sharded_optimizer

    assert type(stepping) is torch.optim.AdamW
    assert find_sharded_optimizer(stepping) is stepper
    assert find_sharded_optimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)])) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a scheduler finds `step` replaced
        scheduler = torch.optim.lr_scheduler.StepLR(stepping, 1)
    loss_of(model, inputs(1)[0]).backward()
    stepping.step()
    scheduler.step()
    assert sharded.model is model


def test_the_optimizer_stays_the_user_s_own_object(world):
    world(2).run(_same_object)


def _closure(ranks):
    model = tower()
    _, _, stepping = prepare(ranks, model, "3")
    x = mine(inputs(1)[0], ranks.rank, ranks.world_size)

    def closure():
        stepping.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    first = stepping.step(closure)
    second = stepping.step(closure)
    assert second.item() < first.item()


def test_a_closure_is_either_run_or_refused_but_never_ignored(world):
    from shardwise.errors import OptimizerError

    try:
        world(2).run(_closure)
    except OptimizerError as refusal:
        assert "closure" in str(refusal)  # noqa: PT017 - either answer keeps the promise


REFUSED = {
    "LBFGS": torch.optim.LBFGS,
    "SparseAdam": torch.optim.SparseAdam,
}


class Stranger(torch.optim.Optimizer):
    """An optimizer of unknown arithmetic: it looks at several parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            size = sum(p.grad.norm() for p in group["params"] if p.grad is not None)
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad / size)


REFUSED["Stranger"] = Stranger


def _refused(ranks, name, plan):
    from shardwise.errors import OptimizerError

    with pytest.raises(OptimizerError) as caught:
        prepare(ranks, tower(), plan, optimizer=REFUSED[name])
    return str(caught.value)


@pytest.mark.parametrize("plan", ["1", "3"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_is_not_elementwise_is_refused_by_name(world, name, plan):
    for text in world(2).run(_refused, name, plan):
        assert name in text


def _foreign(ranks, where):
    from shardwise.errors import OptimizerError
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    strangers = [torch.nn.Parameter(torch.zeros(3))]
    parameters = strangers if where == "all" else [*trained(model), *strangers]
    stepping = torch.optim.AdamW(parameters)
    with pytest.raises(OptimizerError) as caught:
        ShardedOptimizer(stepping, [shard(ranks, model, "3")])
    return str(caught.value)


@pytest.mark.parametrize("where", ["all", "one"])
def test_an_optimizer_over_foreign_parameters_is_refused_on_every_rank(world, where):
    texts = world(2).run(_foreign, where)
    assert all("(3,)" in text or "parameter" in text for text in texts)


def _after_prepare(ranks, plan):
    """The optimizer made after the model was sharded, from its released parameters."""
    from rig.engine import adamw, largest_difference, weights_of
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(trained(reference))
    sharded = shard(ranks, model, plan)
    stepping = adamw(trained(model))
    ShardedOptimizer(stepping, [sharded])
    for batch in inputs(4):
        step_both(ranks, batch, (reference, plain), (model, stepping))
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["1", "3", "3-all"])
def test_an_optimizer_made_after_the_model_was_sharded_works_too(world, plan):
    world(2).run(_after_prepare, plan)


def _part_of_the_model(ranks, plan):
    """An optimizer over some of the trained weights: the others keep their gradients to themselves and do not move."""
    from rig.engine import adamw, largest_difference, weights_of
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw([p for n, p in reference.named_parameters() if n.startswith("blocks.1") or n == "head.bias"])
    stepping = adamw([p for n, p in model.named_parameters() if n.startswith("blocks.1") or n == "head.bias"])
    sharded = shard(ranks, model, plan)
    ShardedOptimizer(stepping, [sharded])
    for batch in inputs(4):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        plain.step()
        reference.zero_grad()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "1", "3", "3-all"])
def test_an_optimizer_over_part_of_the_model_moves_that_part(world, plan):
    world(2).run(_part_of_the_model, plan)


def _two_optimizers(ranks, plan):
    from rig.engine import adamw, largest_difference, weights_of
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    reference = copy.deepcopy(model)
    halves = lambda m: (trained(m)[:5], trained(m)[5:])  # noqa: E731
    plain = [adamw(half) for half in halves(reference)]
    stepping = [adamw(half) for half in halves(model)]
    sharded = shard(ranks, model, plan)
    for optimizer in stepping:
        ShardedOptimizer(optimizer, [sharded])
    for batch in inputs(4):
        plain_step(reference, batch, ranks.world_size, 0, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in (*plain, *stepping):
            optimizer.step()
        for optimizer in (*plain, *stepping):
            optimizer.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "1", "3", "3-all"])
def test_two_optimizers_share_one_model(world, plan):
    world(2).run(_two_optimizers, plan)
