"""Verbs in which one rank meets something that the others do not: what it meets is everybody's, and nobody waits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ranks.test_front_training import fresh
from shardwise.errors import PrepareError


class Heads(nn.Module):
    """A weight of one element and a larger one: with three ranks somebody holds nothing of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.body = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(x)


INPUT = torch.arange(6.0).reshape(2, 3)


def _groups(stage: int, several: bool, turned: bool) -> tuple[list, list]:
    """Norms of each group in turn, of shardwise and of plain torch; and the weights afterwards."""
    accelerator, model, plain = fresh(stage), Heads(), Heads()
    found, wanted = [], []

    def optimizers(of: Heads) -> list[torch.optim.Optimizer]:
        sets = [[of.scale], list(of.body.parameters())][:: -1 if turned else 1]
        if several:
            return [torch.optim.SGD(one, lr=0.1) for one in sets]
        return [torch.optim.SGD([{"params": one} for one in sets], lr=0.1)]

    mine, theirs = optimizers(model), optimizers(plain)
    accelerator.prepare(model, *mine)
    for _ in range(2):
        accelerator.backward(model(INPUT).square().mean())
        plain(INPUT).square().mean().backward()
        for optimizer in mine:
            for group in optimizer.param_groups:
                found.append(accelerator.clip_grad_norm_(group["params"], 0.5, norm_type=2).item())
            for group in optimizer.param_groups:
                accelerator.clip_grad_value_(group["params"], 0.2)
            optimizer.step()
            optimizer.zero_grad()
        for optimizer in theirs:
            for group in optimizer.param_groups:
                wanted.append(nn.utils.clip_grad_norm_(group["params"], 0.5).item())
            nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], 0.2)
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    accelerator.free_memory()
    if state:
        for name, value in plain.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-6), name
    return found, wanted


def _clip(ranks):
    for stage in (0, 2, 3):
        for several, turned in itertools.product((False, True), repeat=2):
            found, wanted = _groups(stage, several, turned)
            assert found == pytest.approx(wanted, rel=1e-5), (stage, several, turned)


def test_a_rank_that_holds_nothing_of_an_optimizer_clips_with_the_others(world):
    world(3).run(_clip, timeout_s=60)


def _clip_nothing(ranks):
    accelerator, model = fresh(2), Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    accelerator.backward(model(INPUT).mean())
    with pytest.raises(PrepareError, match="none of these parameters"):
        accelerator.clip_grad_norm_([], 1.0)
    with pytest.raises(PrepareError, match="none of these parameters"):
        accelerator.clip_grad_value_([torch.ones(1)], 1.0)
    accelerator.free_memory()


def test_parameters_of_no_optimizer_are_an_error_on_every_rank(world):
    world(2).run(_clip_nothing, timeout_s=60)
