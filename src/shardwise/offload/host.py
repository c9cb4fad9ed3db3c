"""Shards that rest in host memory, page-locked where there is a GPU.

torch rounds pinned allocations up to a power of two, which can double a slab of many gigabytes. So a slab is ordinary
page-aligned memory of the exact size that is registered with CUDA, and unregistered when it is freed.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ShardwiseError
from ..zero.plan import Tier

_PAGE = 4096


class HostStore:
    """Slabs in host memory for a device; pinned when that device is a GPU, so that copies run beside the computation."""

    tier = Tier.CPU

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) zeros in host memory of the exact size. Raises ShardwiseError if the memory cannot be pinned."""
        if not self.pinned:
            return torch.zeros(numel, dtype=dtype)
        nbytes = numel * dtype.itemsize
        # One page more than needed, so that the registered range starts on a page and no other allocation shares it.
        memory = np.zeros(-(-nbytes // _PAGE) * _PAGE + _PAGE, dtype=np.uint8)
        skip = -memory.ctypes.data % _PAGE
        address = memory.ctypes.data + skip
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, max(nbytes, 1), 0))
        if code != 0:
            raise ShardwiseError(
                f"{nbytes / 2**20:.0f} MiB of host memory could not be pinned (CUDA error {code}). Raise the limit of "
                "locked memory (`ulimit -l`, or --ulimit memlock=-1 in a container), or offload less."
            )
        slab = torch.from_numpy(memory[skip : skip + nbytes]).view(dtype)
        weakref.finalize(memory, _unregister, address)
        return slab

    def fetch(self, slab: Tensor, out: Tensor) -> None:
        out.copy_(slab, non_blocking=True)

    def put(self, source: Tensor, slab: Tensor) -> None:
        slab.copy_(source, non_blocking=True)


def _unregister(address: int) -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
