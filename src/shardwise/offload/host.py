"""Shards that rest in host memory, page-locked where there is a GPU.

What is added to a slab comes down in blocks, by two threads:

    backward --source--> one takes blocks and enqueues copies --> one waits for a copy, adds, gives the block back

The backward itself never waits for a block. A block is free when a reduction is over, which may need ranks that need a gather
first that this rank has not issued.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..plan.plan import Tier
from ..ranks.lanes import Lanes
from .pinned import host_tensor
from .store import Arrival, Done, MemoryStore, Slab
from .striping import BLOCK
from .threads import DeviceThreads


class HostSlab(Slab):
    """A slab in host memory. adding: what is on its way to be added to it."""

    def __init__(self, store: HostStore, numel: int, dtype: torch.dtype, *, pinned: bool) -> None:
        super().__init__(store, Tier.CPU, numel, dtype)
        self._tensor = host_tensor(numel, dtype, pinned=pinned, copies=(self.reads, self.writes))
        self.adding: list[Adding] = []


@dataclass
class Adding:
    """An Arrival of what is added. brought: the event of its last copy. additions: of what has been copied so far."""

    brought: Future[torch.Event | None]
    additions: list[Future[None]]

    def enqueued(self) -> torch.Event | None:
        return self.brought.result()

    def failure(self) -> BaseException | None:
        """What kept it from being added, or None; once it is over."""
        failed = self.brought.exception()  # first: afterwards nothing joins the additions
        found = [failed, *(future.exception() for future in self.additions)]
        return next((error for error in found if error is not None), None)


class HostStore(MemoryStore):
    """Slabs in host memory; pinned when the device is a GPU, so that copies run beside the computation."""

    tier = Tier.CPU

    def __init__(self, lanes: Lanes) -> None:
        super().__init__(lanes)
        self._pinned = lanes.device.type == "cuda"
        self._ring = Ring(self._pinned)
        self._bringing = DeviceThreads(1, "shardwise-down", lanes.device)
        self._adding = DeviceThreads(1, "shardwise-add", lanes.device)
        self._busy: dict[int, HostSlab] = {}  # slabs to which something is added, by id

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> Slab:
        return HostSlab(self, numel, dtype, pinned=self._pinned)

    def fetch(self, slab: Slab, out: Tensor, begin: int = 0) -> Arrival:
        self._settle(slab)
        return super().fetch(slab, out, begin)

    def put(self, source: Tensor, slab: Slab, begin: int = 0) -> Arrival:
        self._settle(slab)
        return super().put(source, slab, begin)

    def expect(self, nbytes: int) -> None:
        """`nbytes` are about to be added: make the blocks now, because to pin memory may hold the host for the device."""
        if self._pinned:
            self._ring.fill(-(-nbytes // BLOCK))

    def add(self, source: Tensor, slab: Slab, after: torch.Event | None) -> Arrival:
        """Add `source`, a device tensor that is written when `after` is done, to the whole slab; `drain` waits for it.

        The event is the source's, as in `put`. Returns at once; the Arrival's `enqueued` waits until all but the last blocks
        have come. The slab itself never goes up again: a thread adds on the host.
        """
        assert isinstance(slab, HostSlab)
        if self.lanes.device.type == "cpu":
            slab.tensor.add_(source)
            return Done(None)
        before = [event for event in slab.writes.values() if event is not None]
        additions: list[Future[None]] = []
        brought = self._bringing.submit(partial(self._bring, source, slab, after, before, additions))
        adding = Adding(brought, additions)
        slab.adding.append(adding)
        self._busy[id(slab)] = slab
        return adding

    def _bring(
        self,
        source: Tensor,
        slab: Slab,
        after: torch.Event | None,
        before: Sequence[torch.Event],
        additions: list[Future[None]],
    ) -> torch.Event | None:
        """Copy `source` down block by block, and have what has come added."""
        step = BLOCK // source.element_size()
        event = after
        self.lanes.down.wait(after)
        for begin in range(0, slab.numel, step):
            part = source[begin : begin + step]
            block = self._ring.take()
            with self.lanes.down.on():
                landing = block.memory[: part.nbytes].view(part.dtype)
                landing.copy_(part, non_blocking=True)
                event = block.event = self.lanes.down.mark()
            add = partial(self._add, slab, begin, landing, block, before)
            additions.append(self._adding.submit(add, partial(self._ring.give, block)))
        return event

    def _add(self, slab: Slab, begin: int, landing: Tensor, block: Block, before: Sequence[torch.Event]) -> None:
        for event in (*before, block.event):
            if event is not None:
                event.synchronize()
        slab.tensor[begin : begin + landing.numel()].add_(landing)

    def _settle(self, slab: Slab) -> None:
        """Return once nothing is being added to this slab any more; of what failed `drain` tells."""
        assert isinstance(slab, HostSlab)
        slab.adding = [adding for adding in slab.adding if adding.failure() is not None]

    def drain(self) -> None:
        """Return once everything that was added is in its slab. Raises StoreError for the first that is not."""
        busy, self._busy = self._busy, {}
        failed = [error for slab in busy.values() for adding in slab.adding if (error := adding.failure()) is not None]
        for slab in busy.values():
            slab.adding.clear()
        if failed:
            raise failed[0]

    @property
    def staging_nbytes(self) -> int:
        """Bytes of pinned memory that transfers go through; they hold nothing at rest."""
        return self._ring.nbytes

    def close(self) -> None:
        self._bringing.close()
        self._adding.close()


class Block:
    """One pinned buffer of a ring, and the event of the copy that still uses it."""

    def __init__(self, pinned: bool) -> None:
        self._copies: dict[str, torch.Event | None] = {}
        self.memory = host_tensor(BLOCK, torch.uint8, pinned=pinned, copies=(self._copies,))

    @property
    def event(self) -> torch.Event | None:
        return self._copies.get("last")

    @event.setter
    def event(self, event: torch.Event | None) -> None:
        self._copies["last"] = event


class Ring:
    """Pinned blocks of BLOCK bytes, made when first needed and handed out in turn; `take` waits for a free one."""

    LENGTH = 8

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._made = 0
        self._free: deque[Block] = deque()
        self._changed = threading.Condition()

    def fill(self, count: int) -> None:
        """Have at least `count` blocks, or LENGTH."""
        with self._changed:
            while self._made < min(count, self.LENGTH):
                self._free.append(self._make())
                self._changed.notify()

    def _make(self) -> Block:
        with torch.inference_mode(False):  # it outlives the script's
            block = Block(self._pinned)
        self._made += 1
        return block

    def take(self) -> Block:
        with self._changed:
            while not self._free and self._made == self.LENGTH:
                self._changed.wait()
            if self._free:
                block = self._free.popleft()
            else:
                block = self._make()
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
