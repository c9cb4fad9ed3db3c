"""Writing into weights from outside of training: what was changed while units were gathered goes back into shards and masters.

Rank 0's values are everybody's. A master is changed only where its weight was: elsewhere it keeps the precision that the
16-bit weight does not have.

    weight (bf16)   1.0   2.0   3.0        before
                    1.0   5.0   3.0        after, on rank 0
    master (fp32)   1.001 5.0   2.999      1.001 and 2.999 stay
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..offload.store import Slab
from .collectives import Ranks
from .plan import Tier
from .unit import Unit


def weights_before(units: Sequence[Unit]) -> dict[int, Tensor]:
    """A copy of the gathered weights that this rank keeps masters for, by id of their unit."""
    return {
        id(unit): unit.gradients.region(unit.trainable.whole).clone()
        for unit in units
        if unit.trainable is not None and unit.gradients is not None and not unit.gradients.shares_weights
    }


@torch.no_grad()
def write_back(
    units: Sequence[Unit],
    before: dict[int, Tensor],
    ranks: Ranks,
    fetched: Callable[[Slab], Tensor],
    put: Callable[[Tensor, Slab], None],
) -> None:
    """Take rank 0's values of all gathered `units`. Collective; the device must be idle.

    fetched, put: bring what rests in a slab to the device, and put it back there.
    """
    for unit in units:
        for buffer in (unit.frozen, unit.trainable):
            if buffer is None:
                continue
            if ranks.world_size > 1:
                ranks.broadcast(buffer.whole)
            if buffer.slab is not None:
                put(buffer.own_slice, buffer.slab)
        if id(unit) in before:
            assert unit.trainable is not None
            assert unit.gradients is not None
            now, master = unit.gradients.region(unit.trainable.whole), fetched(unit.gradients.master)
            new = torch.where(now != before[id(unit)], now.to(master.dtype), master)
            if unit.gradients.master.tier is Tier.GPU:
                master.copy_(new)
            else:
                put(new, unit.gradients.master)
