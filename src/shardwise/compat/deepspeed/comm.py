"""deepspeed.comm: torch.distributed, and joining the run by `init_distributed`.

The run is shardwise's: `init_distributed` joins it, so that the engine and whoever calls torch.distributed have one world. A
run of one process has a world of one, which shardwise itself would not need, but its callers ask torch for its size.
"""

from __future__ import annotations

import atexit
import datetime
from typing import Any

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # noqa: F401 - names that are passed on
    HashStore,
    ProcessGroup,
    ReduceOp,
    all_gather,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_to_all_single,
    barrier,
    broadcast,
    broadcast_object_list,
    destroy_process_group,
    gather,
    get_backend,
    get_global_rank,
    get_group_rank,
    get_process_group_ranks,
    group,
    irecv,
    is_available,
    is_initialized,
    isend,
    monitored_barrier,
    new_group,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
    scatter,
    send,
)

from ...config.environment import RankEnvironment
from ...errors import ConfigError
from ...ranks.ranks import Ranks
from ...run.joined import Joined, join_run


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: datetime.timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the run that the launcher's environment describes; nothing if torch.distributed is initialized. Collective.

    dist_backend: None for the device's own; another than nccl and gloo is refused. timeout: of collectives.
    rank, world_size, init_method: where the script says them itself, torch's own init_process_group makes the world.
    """
    if dist.is_initialized() or dist_init_required is False:
        return
    if dist_backend not in (None, "nccl", "gloo", "cpu:gloo,cuda:nccl", "cuda:nccl,cpu:gloo"):
        raise ConfigError(f"init_distributed: dist_backend is {dist_backend!r}; shardwise talks over nccl and gloo.")
    if init_method is not None or (rank, world_size) != (-1, -1):
        dist.init_process_group(
            dist_backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout
        )
        return
    ranks = join_run(beside_accelerate=True, timeout_s=None if timeout is None else timeout.total_seconds())
    if ranks.world_size == 1 and not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(_leave_world_of_one)


def _leave_world_of_one() -> None:
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()


def joined() -> Ranks | None:
    """The run, if this process has joined it."""
    return Joined.ranks


def met() -> Ranks | None:
    """The run, which is joined here if the script has initialized torch.distributed by itself. Collective."""
    return join_run(beside_accelerate=True) if Joined.ranks is None and dist.is_initialized() else Joined.ranks


def get_rank(group: Any = None) -> int:  # noqa: F811 - torch's name of the argument
    """Before the run is joined: what the launcher says."""
    return dist.get_rank(group) if dist.is_initialized() else RankEnvironment.read().rank


def get_world_size(group: Any = None) -> int:  # noqa: F811
    return dist.get_world_size(group) if dist.is_initialized() else RankEnvironment.read().world_size


def get_local_rank() -> int:
    ranks = joined()
    return ranks.local_rank if ranks is not None else RankEnvironment.read().local_rank or 0


def get_world_group() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None
