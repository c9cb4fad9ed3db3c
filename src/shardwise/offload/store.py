"""Where shards rest: a Store hands out slabs, and a slab is fetched to the device and put back.

The engine never asks which tier it talks to. A slab on the device is read in place; one in host memory is copied on the
lane that is current when `fetch` or `put` is called. Sizes are exact: nothing is rounded up to a power of two.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..zero.plan import Tier


class Store(Protocol):
    """Allocates resting places of one tier."""

    tier: Tier

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) zeros at rest on this tier; the caller owns them."""
        ...

    def fetch(self, slab: Tensor, out: Tensor) -> None:
        """Enqueue a copy of `slab` into `out`, a device tensor of its size, on the current lane."""
        ...

    def put(self, source: Tensor, slab: Tensor) -> None:
        """Enqueue a copy of `source`, a device tensor, into `slab` on the current lane; casts where dtypes differ."""
        ...


class DeviceStore:
    """Shards that rest on the rank's device."""

    tier = Tier.GPU

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def fetch(self, slab: Tensor, out: Tensor) -> None:
        out.copy_(slab)

    def put(self, source: Tensor, slab: Tensor) -> None:
        slab.copy_(source)
