"""What a plain model on each rank needs to be trained beside a sharded one."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.ranks.ranks import Ranks
from shardwise.zero.sharded import ShardedModel


def average_gradients(ranks: Ranks, plain: nn.Module) -> None:
    """Over the ranks, of what any rank has used. Collective."""
    used = ranks.any_of([parameter.grad is not None for parameter in plain.parameters()])
    for parameter, anywhere in zip(plain.parameters(), used, strict=True):
        if anywhere:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            ranks.all_reduce(grad, "mean")
            parameter.grad = grad


def weights_apart(sharded: ShardedModel, plain: nn.Module) -> float:
    """The largest difference of a weight. Collective."""
    with sharded.gathered():
        pairs = zip(sharded.model.parameters(), plain.parameters(), strict=True)
        return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
