"""Optimizers that share one fp16 loss scale each skip their own overflow, and read gradients by the scale that these carry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rig.engine import inputs, largest_difference, loss_of, mine, plain_step, shard, tower, weights_of


def _two(ranks: Any, plan: str, interval: int) -> tuple[Any, Any, Any, Any]:
    from shardwise.plan.precision import LossScaler
    from shardwise.step.optimizer import ShardedOptimizer

    model = tower()
    reference = copy.deepcopy(model)
    parts = [
        [p for n, p in m.named_parameters() if n.startswith("head") is head]
        for m in (model, reference)
        for head in (False, True)
    ]
    ours, theirs = ([torch.optim.SGD(p, lr=1e-2) for p in pair] for pair in (parts[:2], parts[2:]))
    sharded = shard(ranks, model, plan)
    scaler = LossScaler(enabled=True, init_scale=1024.0, growth_interval=interval)
    steppers = [ShardedOptimizer(optimizer, [sharded], scaler=scaler) for optimizer in ours]
    return sharded, steppers, reference, theirs


def _backward(ranks: Any, sharded: Any, steppers: Any, batch: Any, factor: float = 1.0) -> None:
    loss = loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size)) * factor
    scaled = steppers[0].scaler.scale(loss)
    for stepper in steppers:
        stepper.note_loss(loss)
    scaled.backward()


def _rounds(ranks: Any, plan: str) -> list[float]:
    sharded, steppers, reference, theirs = _two(ranks, plan, 2)
    values = []
    for step, batch in enumerate(inputs(6)):
        plain_step(reference, batch, ranks.world_size, step, loss_of)
        _backward(ranks, sharded, steppers, batch)
        for stepper, plain in zip(steppers, theirs, strict=True):
            stepper.optimizer.step()
            stepper.optimizer.zero_grad()
            plain.step()
            plain.zero_grad()
        values.append(steppers[0].scaler.state_dict()["value"])
    assert largest_difference(weights_of(sharded), reference) <= 1e-6
    return values


@pytest.mark.parametrize("plan", ["0", "1", "2", "3", "3-disk"])
def test_two_optimizers_that_step_together_are_one_round(world, plan):
    assert world(2).run(_rounds, plan) == [[1024.0, 2048.0, 2048.0, 4096.0, 4096.0, 8192.0]] * 2


def _one_waits(ranks: Any, plan: str) -> None:
    """The first steps, which moves the scale, while the second's gradients gather another micro-batch."""
    sharded, steppers, reference, theirs = _two(ranks, plan, 1)
    for step, batch in enumerate(inputs(4)):
        _backward(ranks, sharded, steppers, batch)
        plain_step(reference, batch, ranks.world_size, step, loss_of)
        for number in (0, 1) if step % 2 else (0,):
            steppers[number].optimizer.step()
            steppers[number].optimizer.zero_grad()
            theirs[number].step()
            theirs[number].zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["0", "1", "2", "3"])
def test_gradients_that_wait_are_summed_in_the_new_scale(world, plan):
    world(2).run(_one_waits, plan)


def _overflow(ranks: Any, plan: str) -> None:
    sharded, steppers, _, _ = _two(ranks, plan, 1)
    before = weights_of(sharded)
    _backward(ranks, sharded, steppers, inputs(1)[0])
    for shard_ in steppers[1].groups.shards[:1]:
        shard_.gradient().fill_(float("inf"))
        shard_.trained.sums.changed()
    for stepper in steppers:
        stepper.optimizer.step()
    after = weights_of(sharded)
    assert [stepper.step_was_skipped for stepper in steppers] == [False, True]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("head")}
    assert steppers[0].scaler.state_dict()["value"] == 512.0


@pytest.mark.parametrize("plan", ["0", "2", "3"])
def test_only_the_one_that_overflowed_is_skipped(world, plan):
    world(2).run(_overflow, plan)
