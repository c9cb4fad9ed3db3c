"""A NaN of one rank is a NaN of all, also in the largest and the smallest, where a backend keeps it or not as ranks come."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import shardwise
from ranks.test_front_training import fresh
from shardwise.ranks.ranks import Ranks


def _reduced(ranks: Ranks, holder: int) -> list[bool]:
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for op in ("max", "min"):
            values = torch.tensor([1.0 + ranks.rank, math.inf, -math.inf], dtype=dtype)
            clean = values.clone()
            values[0] = math.nan if ranks.rank == holder else values[0]
            ranks.all_reduce(values, op)
            ranks.all_reduce(clean, op)
            first = float(ranks.world_size) if op == "max" else 1.0
            found.append(bool(values[0].isnan()) and values[1:].tolist() == [math.inf, -math.inf])
            found.append(clean.tolist() == [first, math.inf, -math.inf])
    whole = torch.tensor([ranks.rank, 7])
    ranks.all_reduce(whole, "max")
    return [*found, whole.tolist() == [ranks.world_size - 1, 7]]


@pytest.mark.parametrize("holder", [0, 1, 2])
def test_the_largest_and_the_smallest_over_ranks_keep_a_nan_of_any(world: Any, holder: int) -> None:
    for found in world(3).run(_reduced, holder):
        assert all(found), found


def _clipped(ranks: Ranks, stage: int) -> list[float]:
    accelerator = fresh(stage)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 8)).sum())
    weight = model[1].weight
    gradient = shardwise.full(weight, "gradient").clone()
    gradient[0, 0] = math.nan  # on the part of one rank
    shardwise.set_full(weight, "gradient", gradient)
    norms = [float(weight.grad.norm(math.inf)), float(accelerator.clip_grad_norm_(model.parameters(), 1.0, math.inf))]
    accelerator.free_memory()
    return norms


@pytest.mark.parametrize("stage", [2, 3])
def test_an_infinity_norm_shows_a_nan_that_one_rank_has(world: Any, stage: int) -> None:
    for norms in world(2).run(_clipped, stage):
        assert all(map(math.isnan, norms)), norms
