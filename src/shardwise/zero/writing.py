"""Writing into weights from outside of training: what a script has changed goes into shards and masters.

Either it has done so in `gathered(modify=True)`, where rank 0's values are everybody's, or every rank has written the same, as
it would in plain torch. A master follows its weight only where that is no longer what the master rounds to: elsewhere it keeps
the precision that the 16-bit weight does not have.

    master (fp32)   1.001 2.002 2.999      before
    weight (bf16)   1.0   5.0   3.0        after a script has written 5.0
    master (fp32)   1.001 5.0   2.999      after the masters have followed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..offload.store import Slab
from ..plan.plan import Tier
from ..ranks.ranks import Ranks
from .unit import Unit, Weights

Fetch = Callable[[Slab], Tensor]
Put = Callable[[Tensor, Slab], None]


@torch.no_grad()
def write_back(units: Sequence[Unit], ranks: Ranks, fetch: Fetch, put: Put) -> None:
    """Take rank 0's values of all gathered `units`. Collective; the device must be idle.

    fetch, put: bring what rests in a slab to the device, and put it back there.
    """
    for unit in units:
        for buffer in unit.buffers:
            buffer.bring_back()
            if ranks.world_size > 1:
                ranks.broadcast(buffer.whole)
            if buffer.slab is not None:
                put(buffer.own_slice, buffer.slab)
        unit.written()  # they are where they belong
        follow(unit, fetch, put)


@torch.no_grad()
def follow(unit: Unit, fetch: Fetch, put: Put) -> None:
    """Let the masters of `unit` follow its trained weights, gathered or at rest."""
    unit.strayed = False
    trained = unit.trained
    if trained is None or trained.shares_weights:
        return
    buffer = trained.buffer
    at_rest = buffer.slab is not None and (unit.state is not Weights.GATHERED or unit.rounded)
    if at_rest and buffer.slab is not None:
        now = fetch(buffer.slab)[trained.region.in_shard]
    else:
        now = buffer.whole[trained.region.interval]
    master = fetch(trained.master)
    new = torch.where(now != master.to(now.dtype), now.to(master.dtype), master)
    if trained.master.tier is Tier.GPU:
        master.copy_(new)
    else:
        put(new, trained.master)


def has_strayed(unit: Unit) -> bool:
    """Whether a script may have written trained weights of `unit` that its masters do not know; of those that stay whole."""
    if unit.frozen is not None and not unit.frozen.leaves:
        unit.frozen.bring_back()
    buffer = unit.trained.buffer if unit.trained is not None else None
    if buffer is None or buffer.leaves:
        return unit.strayed
    written = bool(buffer.bring_back()) | bool(buffer.guard.written()) | bool(buffer.guard.handed.take())
    return written or unit.strayed
