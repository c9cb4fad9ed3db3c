"""The stores of the tiers that rest on a disk. A new one is a store, its row in `config/offloads.Tier`, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..config.offloads import Directories
from ..plan.plan import Tier
from ..ranks.lanes import Lanes
from .host import Ring
from .nvme import NvmeStore
from .store import Store
from .striping import BLOCK


@dataclass(frozen=True)
class OnDisk:
    """open: makes the store from its directories, the lanes and the rank, or raises StoreError.

    staging_nbytes: the most that its transfers take of host memory, on a rank and for each directory.
    """

    open: Callable[[Directories, Lanes, int], Store]
    staging_nbytes: int = 0


ON_DISK: Mapping[Tier, OnDisk] = {
    Tier.NVME: OnDisk(NvmeStore, 2 * Ring.LENGTH * BLOCK),
}
