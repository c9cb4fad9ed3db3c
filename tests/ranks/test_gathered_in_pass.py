"""`gathered` inside a running forward or backward: a fused head enters it in both, as TRL's does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from rig.engine import Tower, inputs, largest_difference, mine, prepare, train_both, weights_of
from shardwise.errors import WriteError


class _FusedHead(torch.autograd.Function):
    """The mean square of x @ weight.T, without keeping the weight: it is read again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        with shardwise.gathered(weight):
            ctx.out = x @ weight.detach().T
        return ctx.out.square().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        own = gradients[0] * 2 * ctx.out / ctx.out.numel()
        with shardwise.gathered(weight):
            into = own @ weight.detach()
        return into, own.T @ x


class FusedTower(Tower):
    """Its head is a unit of its own, which no module's forward ever asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return _FusedHead.apply(x, self.head.weight)


class ReadingTower(FusedTower):
    """Reads its head in a `gathered` of its own, before its blocks and behind them, and enters none in the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with shardwise.gathered(self.head):
            x = x + 0.1 * self.head.weight.sum(0)
        for block in self.blocks:
            x = block(x)
        with shardwise.gathered(self.head):
            return (x @ self.head.weight.T).square().mean()


def _plain_loss(model: FusedTower, x: torch.Tensor) -> torch.Tensor:
    x = model.first(x)
    if isinstance(model, ReadingTower):
        x = x + 0.1 * model.head.weight.sum(0)
    for block in model.blocks:
        x = block(x)
    return (x @ model.head.weight.T).square().mean()


class LateTower(FusedTower):
    """Reads a block's weight in a `gathered` of its own from step 3 on, when the passes have been learned."""

    step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        if self.step < 3:
            return self.head(x).square().mean()
        with shardwise.gathered(self.blocks[0]):
            x = x @ self.blocks[0].down.weight[:, :12]
        return self.head(x).square().mean()


def _train_late(ranks: Any, plan: str) -> None:
    def loss_of(model: LateTower, x: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        model.step = step
        return model(x)

    train_both(ranks, _fused(LateTower), plan, loss_of=loss_of)


@pytest.mark.parametrize("plan", ["3", "3-all"])
def test_it_may_be_entered_for_the_first_time_when_the_passes_are_known(world, plan):
    world(2).run(_train_late, plan)


def _fused(kind: type[FusedTower] = FusedTower) -> FusedTower:
    torch.manual_seed(5)
    return kind()


def _train(ranks: Any, plan: str, kind: type[FusedTower]) -> None:
    model = _fused(kind)
    reference = copy.deepcopy(model)
    sharded, _, stepping = prepare(ranks, model, plan, units=["Block", "head"])
    plain = torch.optim.AdamW(reference.parameters(), lr=3e-3, eps=1e-4)
    for batch in inputs(5):
        for rank in range(ranks.world_size):
            (_plain_loss(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
        plain.step()
        plain.zero_grad()
        model(mine(batch, ranks.rank, ranks.world_size)).backward()
        with torch.no_grad():
            model(mine(batch, ranks.rank, ranks.world_size))
        stepping.step()
        stepping.zero_grad()
    assert largest_difference(weights_of(sharded), reference) <= 1e-6


@pytest.mark.parametrize("plan", ["2", "3", "3-all"])
def test_a_fused_head_reads_its_weight_in_both_passes(world, plan):
    world(2).run(_train, plan, FusedTower)


@pytest.mark.parametrize("plan", ["3", "3-all"])
def test_what_is_computed_there_has_its_backward(world, plan):
    world(2).run(_train, plan, ReadingTower)


def _write(ranks: Any) -> None:
    model = _fused()
    _, _, _ = prepare(ranks, model, "3", units=["Block", "head"])

    def wrong(module: nn.Module, args: Any) -> None:
        with shardwise.gathered(model.head, modify=True):
            pass

    handle = model.blocks[1].register_forward_pre_hook(wrong)
    with pytest.raises(WriteError, match="inside a forward or a backward"):
        model(inputs(1)[0])
    handle.remove()

    def lost(module: nn.Module, args: Any) -> None:
        with shardwise.gathered(model.head), torch.no_grad():
            model.head.weight.add_(1)

    handle = model.blocks[1].register_forward_pre_hook(lost)
    with pytest.raises(WriteError, match=r"head\.weight was written inside a forward"):
        model(inputs(1)[0])
    handle.remove()
    model(inputs(1)[0]).backward()


def test_writing_inside_a_pass_is_an_error(world):
    world(2).run(_write)
