"""Shards that the other ranks of a machine read by themselves, over NVLink, with copy engines.

A gather by NCCL is a kernel: it holds multiprocessors for as long as it runs, and it begins when the slowest rank has come.
Here every rank maps the others' shards into its own address space, and a gather is one plain copy from each of them:

    rank 0   shard 0 ------------------> whole [ 0 | 1 ]
                     \\ copy engine       ^
    rank 1   shard 1 --\\---------------- /

No multiprocessor takes part, and no rank waits for another. So nothing orders a copy against a rank that changes its shard,
and that must be said: `fence` holds a lane until every rank's lane has come. Frozen shards never change and need none; trained
ones need two for a step, one behind the gathers before it and one before the gathers behind it. What writes into shards
otherwise (a checkpoint, `gathered(modify=True)`) does so between `meet`s, which hold the hosts.

It is for ranks of one machine whose GPUs reach each other's memory: of a run on several machines those that `shard_group` keeps
on one. All ranks of the run gather in one way. Memory is torch's symmetric memory, without multicast.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import PrepareError
from ..plan.plan import Tier
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks
from .store import MemoryStore, Slab

log = logging.getLogger("shardwise")

GatherWith = Literal["auto", "nccl", "copy_engine"]

# Smaller shards are gathered by NCCL: a mapping takes whole pages of 2 MiB, and little is won.
MIN_SHARD_NBYTES = 1 << 20


class PeerMemory:
    """Allocates shards that all ranks of `ranks.shards` can read, and orders their readers and writers.

    changing: whether any of them is changed by steps.
    """

    def __init__(self, ranks: Ranks, lanes: Lanes) -> None:
        self.ranks = ranks
        self.lanes = lanes
        self.changing = False

    @classmethod
    def open(cls, ranks: Ranks, lanes: Lanes, gather_with: GatherWith) -> PeerMemory | None:
        """None where NCCL shall gather, or must: then PrepareError for "copy_engine". Collective."""
        if gather_with == "nccl" or ranks.shards.size == 1:
            return None
        reason = _why_not(ranks)
        if reason is None:
            peers = cls(ranks, lanes)
            peers.meet()  # memory that a model before this one gave back may still be read
            error = _trial(ranks)
            reasons = [text for text in ranks.gather_objects(error) if text is not None]
            if not reasons:
                return peers
            reason = reasons[0]
        if gather_with == "copy_engine":
            raise PrepareError(
                f"gather_with: copy_engine is not possible here: {reason}. Take auto or nccl, which gather by NCCL."
            )
        log.info("weights are gathered by NCCL: %s", reason)
        return None

    def allocate(self, store: MemoryStore, numel: int, dtype: torch.dtype, *, changes: bool) -> Slab | None:
        """(numel,) zeros on the device of every rank of the group, as many on each. None if it is too small. Collective.

        changes: steps will write into it.
        """
        if numel * dtype.itemsize < MIN_SHARD_NBYTES:
            return None
        shared = self.ranks.shards.map_shared(numel, dtype)
        self.changing |= changes
        slab = Slab(store, Tier.GPU, numel, dtype, shared[self.ranks.shards.rank])
        slab.peers = shared
        return slab

    def before_step(self) -> None:
        """The computation waits until no rank reads what the coming step changes. Collective."""
        if self.changing:
            self._fence()
            self.lanes.compute_waits(self.lanes.gather.mark())

    def after_step(self) -> None:
        """Gathers enqueued from now on wait until every rank's step has written. Collective."""
        if self.changing:
            self.lanes.gather.wait(self.lanes.mark_compute())
            self._fence()

    def _fence(self) -> None:
        with self.lanes.gather.on():
            self.ranks.shards.fence()

    def meet(self) -> None:
        """Return when no rank's device has anything left to do. Collective."""
        self.lanes.synchronize()
        self.ranks.barrier()


def _why_not(ranks: Ranks) -> str | None:
    """What stands against peer copies, known without a trial; the same on every rank. Collective."""
    if ranks.device.type != "cuda":
        return "the ranks run on CPUs"
    if any(ranks.any_of([not on_one_machine(ranks)])):
        several = "the ranks" if ranks.copies.size == 1 else "the ranks of a shard group"
        return f"{several} are on several machines"
    blind = torch.cuda.device_count() < ranks.local_world_size
    if any(ranks.any_of([blind])):
        return "a rank does not see the GPUs of the others"
    mine, others = ranks.local_rank, [ranks.local_ranks[rank] for rank in ranks.shards.members]
    apart = any(not torch.cuda.can_device_access_peer(mine, other) for other in others if other != mine)
    if any(ranks.any_of([apart])):
        return "the GPUs do not reach each other's memory"
    return None


def on_one_machine(ranks: Ranks) -> bool:
    """Whether the ranks that divide this one's shards are all on its machine."""
    return len({ranks.machines[rank] for rank in ranks.shards.members if ranks.machines}) <= 1


def _trial(ranks: Ranks) -> str | None:
    """Share a little memory and read all of it; gives what went wrong on this rank."""
    failed: str | None = None
    shared: Sequence[Tensor] = ()
    shards = ranks.shards
    try:
        shared = shards.map_shared(MIN_SHARD_NBYTES, torch.uint8)
        shared[shards.rank].fill_(1 + shards.rank % 200)
        torch.cuda.synchronize(ranks.device)
    except Exception as error:  # whatever torch or the driver says: NCCL can always gather
        failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    ranks.barrier()
    for rank, tensor in enumerate(shared):
        local = torch.zeros(MIN_SHARD_NBYTES, dtype=torch.uint8, device=ranks.device)
        local.copy_(tensor)
        if failed is None and not bool((local == 1 + rank % 200).all()):
            failed = f"rank {ranks.rank} read wrong bytes of rank {rank}"
    ranks.barrier()
    return failed
