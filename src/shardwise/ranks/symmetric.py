"""Memory of every rank's device, mapped into this process. Source: torch's symmetric memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.environment import without_multicast


def map_shared(group: dist.ProcessGroup, device: torch.device, numel: int, dtype: torch.dtype) -> list[Tensor]:
    """See `Group.map_shared`. Collective over `group`."""
    import torch.distributed._symmetric_memory as symmetric

    without_multicast()
    pool = _pool_of_its_own(symmetric, device)
    if pool is not None:
        # Through torch's allocator, so that its statistics count these bytes too.
        with torch.cuda.use_mem_pool(pool):
            own = torch.zeros(numel, dtype=dtype, device=device)
    else:
        own = symmetric.empty(numel, dtype=dtype, device=device).zero_()
    handle = symmetric.rendezvous(own, group)
    rank = dist.get_rank(group)
    return [own if r == rank else handle.get_buffer(r, (numel,), dtype) for r in range(dist.get_world_size(group))]


def _pool_of_its_own(symmetric: Any, device: torch.device) -> Any:
    """A pool of torch's for memory that ranks share, with nothing in it; None where torch has no such pools.

    torch's own pool hands out again what was given back. Ranks give back when their garbage is collected, so one would get
    memory that it has shared before, and skip the exchange in which the others wait for it.
    """
    pools = getattr(symmetric, "_symm_mem_pools", None)
    if pools is None:
        return None
    pools.pop(device, None)
    pool = symmetric.get_mem_pool(device)
    pools.pop(device, None)
    return pool
