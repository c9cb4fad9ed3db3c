"""Slabs in host memory that are written to a file from where they rest, while the training goes on and overwrites them.

    slab     | written | written | being written | not yet | not yet |        blocks of some MiB
    a step puts new values into ......................... ^
    spare                                          old values, copied before, and written from there

A step that comes to a block before the writer does has the old values copied into a spare block, and goes on. Of spare blocks
there are SPARE_NBYTES; where they are all taken, the step waits until the writer is done with this block or with a spare one.
So a save takes no second copy of what was offloaded, and no step overwrites what has not been saved.

Who else writes there does not ask: a script that has a state in its hands. torch counts writes to a tensor, and those of
steps are known, so any other is noticed, if not undone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from ..offload.store import Slab

SPARE_NBYTES = 256 << 20  # of a rank, while a save is under way


class _State(Enum):
    RESTING = "resting"
    COPIED = "being copied"  # into spare memory
    SPARED = "in spare memory"
    WRITTEN = "being written"
    DONE = "done"


@dataclass(eq=False)
class _Kept:
    """A slab and its blocks. writes: torch's count of writes to it, with every write that was asked for."""

    slab: Slab
    blocks: list[Block] = field(default_factory=list)
    writes: int = 0

    def written_unasked(self) -> bool:
        """Whether somebody has written who did not ask. Of those who did some may not have come to it yet."""
        return self.counted() > self.writes

    def counted(self) -> int:
        """How often the slab was written, by torch's count; of a tensor of inference mode there is none."""
        return 0 if self.slab.tensor.is_inference() else self.slab.tensor._version


@dataclass(eq=False)
class Block:
    """Bytes [begin, end) of a slab. number: what the writer calls it."""

    number: int
    memory: Tensor
    begin: int
    end: int
    kept: _Kept
    state: _State = _State.RESTING
    spare: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Keeping:
    """The blocks of one save. ready: returns when what was put into the slabs has arrived there. Any thread may use it.

    spoiled: somebody has overwritten what was not written yet, and nobody gave way.
    """

    def __init__(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._changed = threading.Condition()
        self._resting: deque[Block] = deque()  # and those that are not any more, until they come to the front
        self._first: deque[Block] = deque()  # in spare memory, or waited for by a step
        self._of: dict[int, _Kept] = {}
        self.spoiled = False
        self._copying = 0
        self._spare_nbytes = 0
        self.most_spare_nbytes = 0

    def add(self, slab: Slab, begin: int, end: int, number: int) -> None:
        """Keep the bytes [begin, end) of `slab` until they are written. Before `watch`."""
        memory = slab.tensor.detach().view(torch.uint8)[begin:end]
        kept = self._of.setdefault(id(slab), _Kept(slab))
        block = Block(number, memory, begin, end, kept)
        self._resting.append(block)
        kept.blocks.append(block)

    def watch(self) -> None:
        """From now on nobody overwrites a block that is not written. `close` ends it."""
        for kept in self._of.values():
            kept.writes = kept.counted()
            kept.slab.keeper = _Keeper(self, kept)

    @contextmanager
    def next_block(self) -> Iterator[tuple[int, Tensor] | None]:
        """(number, bytes) of a block for the caller to write inside; None when all are taken. First what a step waits for."""
        with self._changed:
            while (block := self._choose()) is None and self._copying:
                self._changed.wait()
            if block is not None:
                block.state = _State.WRITTEN
        if block is None:
            yield None
            return
        try:
            yield block.number, block.memory if block.spare is None else block.spare
        finally:
            with self._changed:
                block.state = _State.DONE
                self.spoiled = self.spoiled or block.kept.written_unasked()
                if block.spare is not None:
                    block.spare = None
                    self._spare_nbytes -= block.nbytes
                self._changed.notify_all()

    def _choose(self) -> Block | None:
        for waiting in (self._first, self._resting):
            while waiting:
                block = waiting.popleft()
                if block.state in (_State.RESTING, _State.SPARED):
                    return block
        return None

    def give_way(self, kept: _Kept, begin: int, end: int) -> None:
        """Return when the bytes [begin, end) of the slab may be overwritten, once."""
        left = [one for one in kept.blocks if one.state is not _State.DONE]
        met = [one for one in left if one.begin < end and begin < one.end]
        if met:
            self._ready()
        for block in met:
            if self._may_copy(block):
                self._copy(block)
        with self._changed:
            self.spoiled = self.spoiled or (bool(left) and kept.written_unasked())
            kept.writes += 1

    def _may_copy(self, block: Block) -> bool:
        """Wait for the block to be written or copied; True where the caller is to copy it."""
        with self._changed:
            while block.state not in (_State.DONE, _State.SPARED):
                if block.state is _State.RESTING and self._spare_nbytes + block.nbytes <= SPARE_NBYTES:
                    self._spare_nbytes += block.nbytes
                    self.most_spare_nbytes = max(self.most_spare_nbytes, self._spare_nbytes)
                    block.state = _State.COPIED
                    self._copying += 1
                    return True
                if block.state is _State.RESTING:
                    self._first.append(block)
                self._changed.wait()
            return False

    def _copy(self, block: Block) -> None:
        try:
            with torch.inference_mode(False):
                block.spare = block.memory.clone()
        finally:
            with self._changed:
                self._copying -= 1
                block.state = _State.RESTING if block.spare is None else _State.SPARED
                if block.spare is None:
                    self._spare_nbytes -= block.nbytes
                self._first.append(block)
                self._changed.notify_all()

    def close(self) -> None:
        """All is written, or nothing of it will be: slabs are everybody's again."""
        for kept in self._of.values():
            kept.slab.keeper = None
        with self._changed:
            for kept in self._of.values():
                for block in kept.blocks:
                    block.state, block.spare = _State.DONE, None
            self._resting.clear()
            self._first.clear()
            self._changed.notify_all()
        self._of.clear()


@dataclass(frozen=True)
class _Keeper:
    """`Keeper` of one slab."""

    keeping: Keeping
    kept: _Kept

    def give_way(self, begin: int, end: int) -> None:
        itemsize = self.kept.slab.dtype.itemsize
        self.keeping.give_way(self.kept, begin * itemsize, end * itemsize)
