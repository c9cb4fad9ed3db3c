"""Ranks that hold or use other parts of a model than the others: they agree, and nobody waits for one that has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rig.engine import prepare

STAGES = (1, 2, 3)


class Lopsided(nn.Module):
    """A weight of six elements, of which one rank has all; an expert for each rank; and one that is frozen in the beginning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.randn(6))
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.frozen(self.experts[chosen](x * self.scale))


def batch(rank: int, number: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * rank + number))


def loss_of(model: nn.Module, rank: int, number: int = 0) -> Tensor:
    return model(batch(rank, number), rank).square().mean()


def plain_backward(model: nn.Module, world_size: int, number: int = 0, share: float = 1.0) -> None:
    for rank in range(world_size):
        (loss_of(model, rank, number) * share / world_size).backward()


# Forwards that gather nothing.


def _different_numbers_of_forwards(ranks: Any, plan: str, folder: str) -> None:
    paths = dict.fromkeys(("param", "optimizer"), folder)
    sharded, _, stepping = prepare(ranks, Lopsided(), plan, nvme_paths=paths)
    for number in range(2):
        loss_of(sharded.model, ranks.rank, number).backward()
        stepping.step()
        stepping.zero_grad()
        with torch.no_grad():
            for _ in range(ranks.rank):  # an evaluation of some ranks, as a script for DDP has it
                loss_of(sharded.model, ranks.rank)
            with sharded.generation():
                for _ in range(1 + ranks.rank):
                    loss_of(sharded.model, ranks.rank)


@pytest.mark.parametrize("plan", ["1", "2-opt", "1-disk", "2-disk"])
def test_ranks_run_different_numbers_of_forwards_that_gather_nothing(world, tmp_path, plan):
    world(3).run(_different_numbers_of_forwards, plan, str(tmp_path), timeout_s=30)
