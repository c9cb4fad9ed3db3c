"""Beside an optimizer that steps whole parameters hooks, closures, schedules and averages act as in plain torch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardwise
from rig.engine import inputs, largest_difference, loss_of, mine, plain_step, prepare, tower, weights_of
from rig.optimizers import Assorted, Lamb

PLANS = ("0", "2", "3", "3-disk")
KINDS = (Lamb, Assorted, torch.optim.Adafactor)
STEPS = 5


def _make(kind: Any) -> Any:
    return lambda parameters: kind(parameters, lr=1e-2)


def _beside(ranks: Any, kind: Any, plan: str) -> None:
    """One run with all of them, beside plain torch with all of them."""
    model = tower()
    reference = copy.deepcopy(model)
    plain = _make(kind)(reference.parameters())
    sharded, _, stepping = prepare(ranks, model, plan, optimizer=_make(kind))
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2, 0.3) for each in (plain, stepping)]
    calls: list[tuple[str, Any, bool]] = []

    def note(name: str) -> Any:
        return lambda optimizer, *_: calls.append((name, optimizer is stepping, True))

    stepping.register_step_pre_hook(note("before"))
    stepping.register_step_post_hook(note("after"))
    everywhere = register_optimizer_step_post_hook(
        lambda optimizer, *_: calls.append(("of all", optimizer is stepping, optimizer is not plain))
    )
    average_of = get_ema_multi_avg_fn(0.8)
    expected = AveragedModel(reference, multi_avg_fn=average_of)
    with shardwise.gathered(model) if plan.startswith("3") else nullcontext():
        average = AveragedModel(tower(), multi_avg_fn=average_of)
        average.update_parameters(model)
    expected.update_parameters(reference)
    try:
        for number, batch in enumerate(inputs(STEPS)):
            plain_step(reference, batch, ranks.world_size, number, loss_of)
            plain.step()
            plain.zero_grad()
            calls.clear()

            def closure(batch: Tensor = batch) -> Tensor:
                stepping.zero_grad()
                loss = loss_of(model, mine(batch, ranks.rank, ranks.world_size))
                loss.backward()
                return loss

            given = stepping.step(closure) if number % 2 else None
            if given is None:
                closure()
                stepping.step()
            else:
                assert given.requires_grad
            assert sorted(calls) == [("after", True, True), ("before", True, True), ("of all", True, True)]
            stepping.zero_grad()
            for schedule in schedules:
                schedule.step()
            with shardwise.gathered(model) if plan.startswith("3") else nullcontext():
                average.update_parameters(model)
            expected.update_parameters(reference)
    finally:
        everywhere.remove()
    assert [g["lr"] for g in stepping.param_groups] == [g["lr"] for g in plain.param_groups]
    assert stepping.param_groups[0]["lr"] < 2e-3
    assert largest_difference(weights_of(sharded), reference) <= 2e-6
    found = {name: p.detach() for name, p in average.module.named_parameters()}
    assert largest_difference(found, expected.module) <= 2e-6


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_once_and_closures_schedules_and_averages_are_torchs(world, kind, plan):
    world(2).run(_beside, kind, plan)


def _counts(ranks: Any, plan: str) -> list[int]:
    """Of three ranks one or two step nothing, and count with the others."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 3, bias=False))

    def make(_: Any) -> Any:
        return Assorted([{"params": [model[0].weight]}, {"params": [model[0].bias]}, {"params": [model[1].weight]}])

    _, _, stepping = prepare(ranks, model, plan, optimizer=make)
    for batch in inputs(3):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    return [group["count"] for group in stepping.param_groups]


@pytest.mark.parametrize("plan", PLANS)
def test_a_rank_that_steps_nothing_of_a_group_counts_its_steps(world, plan):
    assert world(3).run(_counts, plan) == [[3, 3, 3]] * 3
