"""The loss scale of fp16 moves as torch's GradScaler does with one `update` for all optimizers that step together."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from shardwise.plan.precision import LossScaler


def _torchs(settings: dict[str, Any], rounds: list[list[bool]]) -> list[tuple[float, int]]:
    """(scale, steps without overflow) after each round, by torch. rounds: whether each optimizer's gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", **settings)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in rounds[0]]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in parameters]
    found = []
    for overflows in rounds:
        scaler.scale(torch.ones(()))
        for parameter, optimizer, overflow in zip(parameters, optimizers, overflows, strict=True):
            parameter.grad = torch.full((2,), float("inf") if overflow else 1.0)
            scaler.step(optimizer)
        scaler.update()
        found.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return found


def _ours(settings: dict[str, Any], rounds: list[list[bool]], resume_at: int | None = None) -> list[tuple[float, int]]:
    scaler = LossScaler(enabled=True, **settings)
    found = []
    for step, overflows in enumerate(rounds):
        scaler.scale(torch.ones(()))
        for overflow in overflows:
            before = scaler.value
            scaler.update(overflow, step=step, say=False)
            assert scaler.value == before  # which the other's gradients still carry
        if step == resume_at:
            state, scaler = scaler.state_dict(), LossScaler(enabled=True, **settings)
            scaler.load_state_dict(state)
        found.append((scaler.state_dict()["value"], scaler.good_steps))
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_the_scale_moves_once_for_all_optimizers_that_step_together(n, interval):
    chance = random.Random(n * 10 + interval)
    settings = {"init_scale": 1024.0, "growth_interval": interval}
    rounds = [[chance.random() < 0.2 for _ in range(n)] for _ in range(40)]
    assert _ours(settings, rounds) == _torchs(settings, rounds)
    assert _ours(settings, rounds, resume_at=17) == _torchs(settings, rounds)


def test_two_optimizers_do_not_make_it_grow_twice_as_fast():
    values = [value for value, _ in _ours({"init_scale": 1024.0, "growth_interval": 4}, [[False, False]] * 8)]
    assert values == [1024.0] * 3 + [2048.0] * 4 + [4096.0]


def test_an_overflow_of_the_first_is_not_undone_by_the_second():
    values = [value for value, _ in _ours({"init_scale": 1024.0, "growth_interval": 1}, [[True, False]] * 3)]
    assert values == [512.0, 256.0, 128.0]


def test_it_does_not_grow_beyond_what_fp32_holds():
    settings = {"init_scale": 2.0**126, "growth_interval": 1}
    assert _ours(settings, [[False]] * 4) == _torchs(settings, [[False]] * 4)
