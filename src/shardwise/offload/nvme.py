"""Shards that rest in files: aligned, preallocated, read and written past the page cache, several blocks at once.

    fetch   disk --thread--> pinned block --up lane--> device        put   device --down lane--> pinned block --thread--> disk

A slab is a file of its own, of whole pages and without a name (`files.py`): it goes with the last reference to the slab, or
with the process, however that ends. Blocks go through two rings of pinned buffers, one for each way, so that no
transfer is longer than a ring and a slab of any size needs the same host memory. Threads do the input and output: the
calls release the interpreter, and two of them keep a drive busy.

Errors of the disk are StoreError. A read's is raised by whoever waits for the bytes, a write's by `drain`, or by the next
read of the slab: never by a thread, and never in the middle of a collective. Of several the first is told, for the others
follow from it; and bytes that could not be written stay unreadable until they are written anew.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StoreError
from ..plan.plan import Tier
from ..ranks.lanes import Lanes
from .files import PAGE, File, Files, take_space
from .host import BLOCK, Block, Ring
from .store import Arrival, Done, Slab
from .threads import DeviceThreads

THREADS = 4

# The two calls that touch a file; tests put failing ones in their place.
read_at = os.preadv
write_at = os.pwritev


class FileSlab(Slab):
    """A slab that is a file of its own, from its first byte on.

    name: what errors call it. file: None where it could not be made; then every byte of it is in `writing`, as failed.
    """

    store: NvmeStore

    def __init__(self, store: NvmeStore, numel: int, dtype: torch.dtype, name: str) -> None:
        super().__init__(store, Tier.NVME, numel, dtype)
        self.name = name
        self.file: File | None = None
        self.writing: list[_Part] = []  # writes under way, and those that failed
        self.reading: list[_Part] = []

    def read_part(self, begin: int, numel: int) -> Tensor:
        lanes = self.store.lanes
        out = torch.empty(numel, dtype=self.dtype, device=lanes.device)
        lanes.up.wait(lanes.mark_compute())
        try:
            lanes.compute_waits(self.fetch(out, begin).enqueued())
        except StoreError:
            self.store.take_fault()  # it is told here
            raise
        return out

    def write_part(self, begin: int, values: Tensor) -> None:
        """Files are written in whole pages, so what shares the first and the last page is read and written again."""
        lanes, page = self.store.lanes, PAGE // self.dtype.itemsize
        first = begin // page * page
        last = min(-(-(begin + values.numel()) // page) * page, self.numel)
        whole = self.read_part(first, last - first)
        whole[begin - first : begin - first + values.numel()].copy_(values)
        lanes.down.wait(lanes.mark_compute())
        lanes.compute_waits(self.put(whole, first).enqueued())
        self.store.drain()


@dataclass
class _Part:
    """Bytes [first, last) of a slab, being read or written."""

    first: int
    last: int
    future: Future[None]

    def meets(self, first: int, last: int) -> bool:
        return self.first < last and first < self.last

    def lies_in(self, first: int, last: int) -> bool:
        return first <= self.first and self.last <= last


@dataclass
class _Reading:
    """An Arrival whose blocks are still being read."""

    futures: list[Future[None]] = field(default_factory=list)
    event: torch.Event | None = None

    def enqueued(self) -> torch.Event | None:
        wait(self.futures)  # all of them, also where one fails: afterwards no thread tells the device of another copy
        for future in self.futures:
            future.result()
        return self.event


class NvmeStore:
    """Slabs in files below `folder`.

    folder: an existing or new directory on the drive. Nothing is seen in it: the files have no names.
    rank:   of this process, for errors.
    bytes_written, bytes_read: what went over the drive since the start.
    files:  the open files; a dropped slab's is closed.
    Raises StoreError if the directory cannot be made or written.
    """

    tier = Tier.NVME

    def __init__(self, folder: str | os.PathLike[str], lanes: Lanes, rank: int) -> None:
        self.lanes = lanes
        self.rank = rank
        self.folder = Path(folder).expanduser()
        self.bytes_written = 0
        self.bytes_read = 0
        pinned = lanes.device.type == "cuda"
        self._incoming, self._outgoing = Ring(pinned), Ring(pinned)
        self._enqueue = threading.Lock()  # of what the threads share: the order on a lane, the counts, the fault
        self._fault: StoreError | None = None
        self._written: set[FileSlab] = set()
        try:
            self.files = Files(self.folder)
        except OSError as error:
            raise self._error("put files into", error) from error
        self._threads = DeviceThreads(THREADS, "shardwise-nvme", lanes.device)
        self._finalizer = weakref.finalize(self, _end, self._threads, self.files)

    # The Store protocol.

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> FileSlab:
        slab = FileSlab(self, numel, dtype, name)
        size = -(-slab.nbytes // PAGE) * PAGE
        try:
            file = self.files.make()
            # Space is taken now: a full disk shows here and not in the middle of a step, and overwriting is faster.
            take_space(file, size)
            slab.file = file
        except OSError as error:
            # Told by `drain`, as a failed write is: the other ranks are on their way into a collective.
            failed: Future[None] = Future()
            failed.set_exception(self._failed(f"take {size:,} bytes for {name} in", error))
            slab.writing.append(_Part(0, slab.nbytes, failed))
            self._written.add(slab)
        return slab

    def fetch(self, slab: Slab, out: Tensor, begin: int = 0) -> Arrival:
        assert isinstance(slab, FileSlab)
        target = out.view(torch.uint8)
        reading = _Reading()
        offset = begin * slab.dtype.itemsize
        slab.reading = [part for part in slab.reading if not part.future.done()]
        for first, last in _parts(offset, offset + target.numel()):
            piece = target[first - offset : last - offset]
            before = [part.future for part in slab.writing if part.meets(first, last)]
            task = self._threads.submit(self._read, slab, first, last, piece, reading, before)
            reading.futures.append(task)
            slab.reading.append(_Part(first, last, task))
        return reading

    def put(self, source: Tensor, slab: Slab, begin: int = 0) -> Arrival:
        assert isinstance(slab, FileSlab)
        down = self.lanes.down
        size = slab.dtype.itemsize
        offset, end = begin * size, (begin + source.numel()) * size
        assert offset % PAGE == 0, "only whole pages are written"
        assert end % PAGE == 0 or end == slab.nbytes, "only whole pages are written"
        last_event = None
        if slab.file is None:
            self._written.add(slab)
            return Done(None)
        # A write that failed is made good by one of the same bytes.
        slab.writing = [
            part
            for part in slab.writing
            if not part.future.done() or (part.future.exception() and not part.lies_in(offset, end))
        ]
        for first, last in _parts(offset, end):
            block = self._outgoing.take()
            with down.on():
                landing = block.memory[: last - first].view(slab.dtype)
                landing.copy_(source[(first - offset) // size : (last - offset) // size], non_blocking=True)
                last_event = down.mark()
            before = [part.future for part in slab.reading if part.meets(first, last)]
            task = self._threads.submit(self._write, slab, first, last, block, last_event, before)
            slab.writing.append(_Part(first, last, task))
        self._written.add(slab)
        return Done(last_event)

    def drain(self) -> None:
        """Return once everything that was put is on the drive. Raises StoreError for the first thing that failed."""
        written, self._written = self._written, set()
        failed: list[BaseException] = []
        for slab in written:
            slab.writing = [part for part in slab.writing if part.future.exception() is not None]
            failed += [error for part in slab.writing if (error := part.future.exception()) is not None]
        first = self.take_fault() or next(iter(failed), None)
        if first is not None:
            raise first

    def take_fault(self) -> StoreError | None:
        with self._enqueue:
            fault, self._fault = self._fault, None
        return fault

    @property
    def staging_nbytes(self) -> int:
        return self._incoming.nbytes + self._outgoing.nbytes

    def close(self) -> None:
        self._finalizer()

    # Blocks.

    def _read(
        self,
        slab: FileSlab,
        first: int,
        last: int,
        out: Tensor,
        reading: _Reading,
        before: Sequence[Future[None]],
    ) -> None:
        for write in before:
            write.result()
        self._threads.take_device()  # before the block, which may be made here, and page-locked for this device
        block = self._incoming.take()
        try:
            file = slab.file
            assert file is not None, "a file that could not be made is a write that failed"
            skip = first % PAGE if file.direct else 0
            wanted = skip + last - first
            length = -(-wanted // PAGE) * PAGE if file.direct else wanted
            buffer = block.memory.numpy()[:length].data
            got, problem = _moved(read_at, file, buffer, first - skip, wanted)
            if problem is not None:
                raise self._failed(f"read {wanted:,} bytes of {slab.name} in", problem)
            if got < wanted:
                lost = OSError(errno.EIO, f"it ends after {got:,} of them and is shorter than it was")
                raise self._failed(f"read {wanted:,} bytes of {slab.name} in", lost)
            # The target may be of torch.inference_mode, as in an evaluation, or not: inside of it both may be written.
            with self._enqueue, self.lanes.up.on(), torch.inference_mode():
                self.bytes_read += got
                out.copy_(block.memory[skip:wanted], non_blocking=True)
                block.event = reading.event = self.lanes.up.mark()
        finally:
            self._incoming.give(block)

    def _write(
        self,
        slab: FileSlab,
        first: int,
        last: int,
        block: Block,
        copied: torch.Event | None,
        before: Sequence[Future[None]],
    ) -> None:
        try:
            self._threads.take_device()
            for read in before:
                read.exception()
            if copied is not None:
                copied.synchronize()
            file = slab.file
            assert file is not None, "`put` writes into no other"
            # The last page is written whole: the file ends with it, and nothing else lies in it.
            length = -(-(last - first) // PAGE) * PAGE if file.direct else last - first
            buffer = block.memory.numpy()[:length].data
            done, problem = _moved(write_at, file, buffer, first, length)
            if problem is None and done < length:
                problem = OSError(errno.EIO, f"it took {done:,} of them and no more")
            if problem is not None:
                raise self._failed(f"write {length:,} bytes of {slab.name} in", problem)
            with self._enqueue:
                self.bytes_written += done
        finally:
            self._outgoing.give(block)

    def _failed(self, action: str, error: OSError) -> StoreError:
        """What to raise where `action` failed: the first error since one was told, for what fails later follows from it."""
        made = self._error(action, error)
        with self._enqueue:
            if self._fault is None:
                self._fault = made
            return self._fault

    def _error(self, action: str, error: OSError) -> StoreError:
        remedy = "Give nvme_path a directory on a drive with room that this process may write to"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "Raise the limit of open files (ulimit -n): each shard is a file"
        elif error.errno == errno.EIO:
            remedy = "Go on with nvme_path on another drive"
        why = error.strerror or error
        made = StoreError(
            f"rank {self.rank} could not {action} {self.folder}: {why}. {remedy}; the last checkpoint is whole."
        )
        made.__cause__ = error
        return made


def _moved(
    call: Callable[..., int], file: File, buffer: memoryview, offset: int, wanted: int
) -> tuple[int, OSError | None]:
    """The bytes that preadv or pwritev moved between `buffer` and the file from `offset` on, and what stopped them.

    A call may stop short of `wanted` without a reason; the one after it has the reason, or moves nothing.
    """
    done = 0
    while done < wanted:
        try:
            more = call(file.descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            return done, error
        if done + more < wanted:
            more -= (done + more) % PAGE  # a file past the cache goes on at a page
        if more <= 0:
            break
        done += more
    return done, None


def _parts(begin: int, end: int) -> list[tuple[int, int]]:
    """Bytes [begin, end) cut into stretches that fit a block together with what alignment adds in front."""
    size = BLOCK if begin % PAGE == 0 else BLOCK - PAGE
    return [(first, min(end, first + size)) for first in range(begin, end, size)]


def _end(threads: DeviceThreads, files: Files) -> None:
    threads.close()
    files.close()
