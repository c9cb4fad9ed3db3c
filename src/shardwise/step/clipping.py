"""Norms over gradient shards, and the one factor by which a step scales them.

A global norm is a local sum of powers and one all_reduce of a few numbers: see `zero/norms.py`. The factor that clips is not a
pass over the gradients: it goes to the optimizer together with the loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from ..ranks.ranks import Ranks
from ..zero.norms import measurable, over_owners


def global_norm(
    shards: Sequence[Tensor], norm_type: float, ranks: Ranks, dtype: torch.dtype, *, sharded: bool
) -> Tensor:
    """The norm of all shards of all ranks together, a scalar on the rank's device.

    shards:    this rank's, any device; there may be none.
    norm_type: p of the p-norm, or infinity.
    dtype:     of the norm and of the sums over ranks; the same on every rank.
    sharded:   each rank holds its own elements; False when every rank holds all of them.
    Collective if sharded.
    """
    if math.isinf(norm_type):
        parts = [shard.abs().max().to(ranks.device, dtype) for shard in shards if shard.numel()]
        largest = torch.stack(parts).max() if parts else torch.zeros((), dtype=dtype, device=ranks.device)
        return over_owners(largest, norm_type, ranks, sharded=sharded)
    total = power_sum(shards, norm_type, ranks.device, dtype)
    return over_owners(total, norm_type, ranks, sharded=sharded) ** (1.0 / norm_type)


def power_sum(shards: Sequence[Tensor], norm_type: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The sum of |element| ** norm_type over this rank's shards, a scalar on `device`.

    Its bits do not depend on where they rest, nor on how wide they are there: what is in host memory or narrow is brought up
    and made wide, one after another.
    """
    filled = [shard for shard in shards if shard.numel()]
    if not filled:
        return torch.zeros((), dtype=dtype, device=device)
    ready = [shard.device == device and shard.dtype.itemsize >= torch.float32.itemsize for shard in filled]
    here = list(compress(filled, ready))
    found = iter(torch._foreach_norm(here, norm_type) if here else ())
    norms = [
        next(found) if is_ready else torch._foreach_norm([measurable(shard, device)], norm_type)[0]
        for shard, is_ready in zip(filled, ready, strict=True)
    ]
    return (torch.stack([norm.to(dtype) for norm in norms]) ** norm_type).sum()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What the gradients are multiplied by so that their norm is at most max_norm: 1 if it is already.

    The 1e-6 is torch.nn.utils.clip_grad_norm_'s, kept so that a clipped run has torch's numbers.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
