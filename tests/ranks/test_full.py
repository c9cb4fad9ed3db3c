"""All of one weight's gradient, master and states, read and written; the norm of a step; models that nobody trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import shardwise
from rig.engine import PLANS, adamw, inputs, largest_difference, loss_of, mine, prepare, shard, tower, weights_of
from shardwise.errors import LayoutError, PrepareError
from shardwise.step.optimizer import ShardedOptimizer


def _plain_step(reference: Any, plain: Any, batch: torch.Tensor, ranks: Any, *, step: bool = True) -> None:
    for rank in range(ranks.world_size):
        (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
    if step:
        plain.step()
        plain.zero_grad()


def _read_and_write(ranks: Any, plan: str) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    sharded, _, stepping = prepare(ranks, model, plan, whole_adapters=False)
    plain = adamw(reference.parameters())
    first, second, third = inputs(3)
    name = "blocks.1.up.weight"
    own, theirs = model.get_parameter(name), reference.get_parameter(name)
    assert shardwise.full(own, "exp_avg") is None
    assert shardwise.full(own, "gradient") is None
    _plain_step(reference, plain, first, ranks)
    loss_of(model, mine(first, ranks.rank, ranks.world_size)).backward()
    stepping.step()
    stepping.zero_grad()
    torch.testing.assert_close(shardwise.full(own, "master"), theirs.detach(), rtol=0, atol=1e-6)
    for state in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(shardwise.full(own, state), plain.state[theirs][state], rtol=1e-5, atol=1e-9)
    assert shardwise.full(own, "no such state") is None

    _plain_step(reference, plain, second, ranks, step=False)
    loss_of(model, mine(second, ranks.rank, ranks.world_size)).backward()
    torch.testing.assert_close(shardwise.full(own, "gradient"), theirs.grad, rtol=1e-5, atol=1e-7)
    new = torch.linspace(-1, 1, theirs.numel()).view_as(theirs)
    with torch.no_grad():
        theirs.grad.copy_(0.5 * new)
        theirs.copy_(new)
        plain.state[theirs]["exp_avg"].copy_(0.1 * new)
    shardwise.set_full(own, "gradient", 0.5 * new)
    shardwise.set_full(own, "exp_avg", 0.1 * new)
    shardwise.set_full(own, "master", new)
    plain.step()
    plain.zero_grad()
    stepping.step()
    stepping.zero_grad()
    _plain_step(reference, plain, third, ranks)
    loss_of(model, mine(third, ranks.rank, ranks.world_size)).backward()
    stepping.step()
    stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 2e-6
    with pytest.raises(LayoutError, match=r"master of blocks\.1\.up\.weight has shape"):
        shardwise.set_full(own, "master", torch.zeros(3))
    with pytest.raises(PrepareError, match="has no gradient now"):
        shardwise.set_full(own, "gradient", new)
    with pytest.raises(PrepareError, match="no 'exp_inf' of"):
        shardwise.set_full(own, "exp_inf", new)


@pytest.mark.parametrize("plan", PLANS)
def test_full_values_are_plain_torchs_and_what_is_written_counts(world, plan):
    world(2).run(_read_and_write, plan)


def _of_fp16(ranks: Any, plan: str) -> None:
    from shardwise.plan.precision import LossScaler

    model = tower()
    reference = copy.deepcopy(model)
    scaler = LossScaler(enabled=True, init_scale=256.0)
    sharded = shard(ranks, model, plan, "fp16")
    stepper = ShardedOptimizer(adamw(model.parameters()), [sharded], scaler=scaler)
    batch = inputs(1)[0]
    _plain_step(reference, None, batch, ranks, step=False)
    scaler.scale(loss_of(model, mine(batch, ranks.rank, ranks.world_size).half()).float()).backward()
    found = shardwise.full(model.head.weight, "gradient")
    torch.testing.assert_close(found, reference.head.weight.grad, rtol=2e-2, atol=2e-3)
    shardwise.set_full(model.head.weight, "gradient", found * 2)
    torch.testing.assert_close(shardwise.full(model.head.weight, "gradient"), found * 2, rtol=1e-3, atol=1e-5)
    stepper.step()
    assert shardwise.full(model.head.weight, "master").dtype == torch.float32


@pytest.mark.parametrize("plan", ["2", "3"])
def test_a_gradient_of_fp16_comes_without_its_loss_scale(world, plan):
    world(2).run(_of_fp16, plan)


def _of_others(ranks: Any) -> None:
    plain = torch.nn.Linear(2, 3)
    assert shardwise.full(plain.weight, "gradient") is None
    assert shardwise.full(plain.weight, "exp_avg") is None
    assert torch.equal(shardwise.full(plain.weight, "master"), plain.weight)
    with pytest.raises(PrepareError, match="of no prepared model"):
        shardwise.set_full(plain.weight, "master", plain.weight)


def test_a_weight_of_no_prepared_model_is_read_as_it_is(world):
    world(1).run(_of_others)


def _norm(ranks: Any, plan: str) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    sharded = shard(ranks, model, plan)
    clipped = ShardedOptimizer(adamw(model.parameters()), [sharded], gradient_clipping=0.01)
    assert clipped.norm is None
    batch = inputs(1)[0]
    _plain_step(reference, None, batch, ranks, step=False)
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
    before = ranks.counts["all_reduce"]
    clipped.step()
    assert ranks.counts["all_reduce"] == before + (ranks.world_size > 1)
    torch.testing.assert_close(clipped.norm, expected, rtol=1e-5, atol=0)

    other = tower()
    measured = ShardedOptimizer(adamw(other.parameters()), [shard(ranks, other, plan)], measures_norm=True)
    loss_of(other, mine(batch, ranks.rank, ranks.world_size)).backward()
    measured.step()
    torch.testing.assert_close(measured.norm, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("plan", ["0", "2", "2-opt", "3"])
def test_a_step_keeps_the_norm_before_it_clips(world, plan):
    world(2).run(_norm, plan)


def _untrained(ranks: Any, plan: str, later: bool) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    sharded = shard(ranks, model, plan, trains=False)
    assert not sharded.trained()
    assert not {role for role, _ in sharded.ledger()} & {"gradient", "optimizer"}
    batch = inputs(1)[0]
    with torch.no_grad():
        assert torch.allclose(model(batch), reference(batch), atol=1e-6)
    assert all(p.requires_grad for p in model.parameters())
    if later:
        stepper = ShardedOptimizer(adamw(model.parameters()), [sharded])
        plain = adamw(reference.parameters())
        _plain_step(reference, plain, batch, ranks)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepper.step()
        assert largest_difference(weights_of(sharded), reference) <= 1e-6
    sharded.release()
    assert largest_difference(dict(model.named_parameters()), reference) <= 1e-6


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("plan", ["2", "3", "3-all"])
def test_a_model_that_nobody_trains_has_no_masters_until_an_optimizer_comes(world, plan, later):
    world(2).run(_untrained, plan, later)
