"""A model whose blocks run in another order on every rank and in every step, sharded and not.

With NCCL a rank that gathers what the others do not would wait for ever, or read another unit's bytes; so would copies that
overtake a step. The plain model averages its gradients by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from by_hand import average_gradients, weights_apart
from torch import Tensor, nn

from shardwise.config.sections import EngineConfig
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.ranks.ranks import Ranks
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.zero.sharded import ShardedModel

WIDTH = 256
STEPS, KNOWN = 10, 3  # in the first ones all ranks take the same way, and learn it
# Without the first block of a pair, backwards, from pair to pair, none, one three times, all.
ROUTES: Sequence[Sequence[int]] = [[1, 3, 4], [4, 3, 2, 1, 0], [0, 2, 1, 3], [], [3, 2, 3], [1], [0, 1, 2, 3, 4]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Maze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, route: Iterable[int]) -> Tensor:
        x = self.first(x)
        for index in route:
            x = self.blocks[index](x)
        result: Tensor = self.head(x)
        return result


def train_on_routes(ranks: Ranks, gather_with: str, units: Sequence[str] | None, prefetch: int) -> tuple[float, float]:
    """The largest difference of a loss, relative, and of a weight, between the sharded model and the plain one."""
    torch.manual_seed(7)
    plain = Maze().to(ranks.device)
    model = copy.deepcopy(plain)
    stepping, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4) for m in (model, plain))
    sharded = ShardedModel(
        model,
        plan=Plan.from_stage(3),
        ranks=ranks,
        precision=Precision.named("no"),
        options=EngineConfig(prefetch_units=prefetch, units=units, gather_with=gather_with),  # type: ignore[arg-type]
    )
    _stepper = ShardedOptimizer(stepping, [sharded])
    apart = 0.0
    for step in range(STEPS):
        torch.manual_seed(100 * step + ranks.rank)
        x = torch.randn(16, 8, device=ranks.device)
        route = ROUTES[-1] if step < KNOWN else ROUTES[(step + 3 * ranks.rank) % len(ROUTES)]
        mine, wanted = model(x, route).square().mean(), plain(x, route).square().mean()
        apart = max(apart, abs(mine.item() - wanted.item()) / abs(wanted.item()))
        for loss in (mine, wanted):
            loss.backward()
        average_gradients(ranks, plain)
        for optimizer in (stepping, theirs):
            optimizer.step()
            optimizer.zero_grad()
    return apart, weights_apart(sharded, plain)
