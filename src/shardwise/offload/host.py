"""Shards that rest in host memory, page-locked where there is a GPU.

torch rounds pinned allocations up to a power of two, which can double a slab of many gigabytes. So a slab is ordinary
page-aligned memory of the exact size that is registered with CUDA, and unregistered when it is freed.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from ..zero.plan import Tier
from ..zero.streams import Lanes
from .files import PAGE
from .store import Arrival, Done, MemoryStore, Slab
from .threads import DeviceThreads

BLOCK = 8 << 20  # bytes; smaller ones do not saturate a drive


class HostStore(MemoryStore):
    """Slabs in host memory; pinned when the device is a GPU, so that copies run beside the computation."""

    tier = Tier.CPU

    def __init__(self, lanes: Lanes) -> None:
        super().__init__(lanes)
        self._ring = Ring(pinned=True)
        self._threads = DeviceThreads(1, "shardwise-add", lanes.device)
        self._adding: list[Future[None]] = []

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> Slab:
        return Slab(self, self.tier, numel, dtype, host_tensor(numel, dtype, pinned=self.lanes.device.type == "cuda"))

    def add(self, source: Tensor, slab: Slab) -> Arrival:
        """Add `source`, a device tensor, to the whole slab; `drain` waits for it. The event is the source's, as in `put`.

        A thread adds on the host what came down block by block: the slab itself never goes up again.
        """
        if self.lanes.device.type == "cpu":
            slab.tensor.add_(source)
            return Done(None)
        step = BLOCK // source.element_size()
        before = [event for event in slab.writes.values() if event is not None]
        event = None
        for begin in range(0, slab.numel, step):
            part = source[begin : begin + step]
            block = self._ring.take()
            with self.lanes.down.on():
                landing = block.memory[: part.nbytes].view(part.dtype)
                landing.copy_(part, non_blocking=True)
                event = block.event = self.lanes.down.mark()
            self._adding.append(self._threads.submit(self._add, slab, begin, landing, block, before))
        return Done(event)

    def _add(self, slab: Slab, begin: int, landing: Tensor, block: Block, before: Sequence[torch.Event]) -> None:
        try:
            self._threads.take_device()
            for event in (*before, block.event):
                if event is not None:
                    event.synchronize()
            slab.tensor[begin : begin + landing.numel()].add_(landing)
        finally:
            self._ring.give(block)

    def drain(self) -> None:
        """Return once everything that was added is in its slab. Raises StoreError for the first that is not."""
        adding, self._adding = self._adding, []
        failed = [error for future in adding if (error := future.exception()) is not None]
        if failed:
            raise failed[0]

    @property
    def staging_nbytes(self) -> int:
        """Bytes of pinned memory that transfers go through; they hold nothing at rest."""
        return self._ring.nbytes

    def close(self) -> None:
        self._threads.close()


@dataclass
class Block:
    """One pinned buffer of a ring, and the event of the copy that still uses it."""

    memory: Tensor
    event: torch.Event | None = None


class Ring:
    """Pinned blocks of BLOCK bytes, made when first needed and handed out in turn; `take` waits for a free one."""

    LENGTH = 8

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._made = 0
        self._free: deque[Block] = deque()
        self._changed = threading.Condition()

    def take(self) -> Block:
        with self._changed:
            while not self._free and self._made == self.LENGTH:
                self._changed.wait()
            if self._free:
                block = self._free.popleft()
            else:
                self._made += 1
                with torch.inference_mode(False):  # it outlives the script's
                    block = Block(host_tensor(BLOCK, torch.uint8, pinned=self._pinned))
        if block.event is not None:
            block.event.synchronize()
            block.event = None
        return block

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the blocks take at this moment."""
        return self._made * BLOCK

    def give(self, block: Block) -> None:
        with self._changed:
            self._free.append(block)
            self._changed.notify()


def host_tensor(numel: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """(numel,) zeros in host memory of the exact size, on a page boundary. Raises StoreError if it cannot be pinned."""
    nbytes = numel * dtype.itemsize
    # One page more than needed, so that the range starts on a page and no other allocation shares a registered one.
    memory = np.zeros(-(-nbytes // PAGE) * PAGE + PAGE, dtype=np.uint8)
    skip = -memory.ctypes.data % PAGE
    if pinned:
        address = memory.ctypes.data + skip
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, max(nbytes, 1), 0))
        if code != 0:
            raise StoreError(
                f"{nbytes / 2**20:.0f} MiB of host memory could not be pinned (CUDA error {code}). Raise the limit of "
                "locked memory (`ulimit -l`, or --ulimit memlock=-1 in a container), or offload less."
            )
        weakref.finalize(memory, _unregister, address)
    return torch.from_numpy(memory[skip : skip + nbytes]).view(dtype)


def _unregister(address: int) -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
