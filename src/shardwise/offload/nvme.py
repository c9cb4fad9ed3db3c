"""Shards that rest in files: aligned, preallocated, read and written past the page cache, several blocks at once.

    fetch   disk --thread--> pinned block --up lane--> device        put   device --down lane--> pinned block --thread--> disk

A slab is a file of its own, of whole pages. Blocks go through two rings of pinned buffers, one for each way, so that no
transfer is longer than a ring and a slab of any size needs the same host memory. Threads do the input and output: the
calls release the interpreter, and two of them keep a drive busy. Files belong to one run and rank, lie in a directory
that the living process holds a lock on, and go when the run ends; what a killed run left behind is named at the next start.

Errors of the disk are StoreError. A read's is raised by whoever waits for the bytes, a write's by `drain`, or by the next
read of the slab: never by a thread, and never in the middle of a collective.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StoreError
from ..zero.plan import Tier
from ..zero.streams import Lanes, workers
from .host import BLOCK, PAGE, Block, Ring
from .store import Arrival, Done, Slab

log = logging.getLogger("shardwise")

THREADS = 4

# The two calls that touch a file; tests put failing ones in their place.
read_at = os.preadv
write_at = os.pwritev


@dataclass
class File:
    """An open file. direct: its descriptor bypasses the page cache, so offsets, sizes and memory are whole pages."""

    path: Path
    descriptor: int
    direct: bool


class FileSlab(Slab):
    """A slab that is a file of its own, from its first byte on. name: what errors call it."""

    def __init__(self, store: NvmeStore, numel: int, dtype: torch.dtype, file: File, name: str) -> None:
        super().__init__(store, Tier.NVME, numel, dtype)
        self.file = file
        self.name = name
        self.writing: list[_Part] = []
        self.reading: list[_Part] = []


@dataclass
class _Part:
    """Bytes [first, last) of a slab, being read or written."""

    first: int
    last: int
    future: Future[None]

    def meets(self, first: int, last: int) -> bool:
        return self.first < last and first < self.last


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

    folder: an existing or new directory on the drive; this run's files lie in a directory of their own in it.
    rank:   of this process, for the names of the files and in errors.
    bytes_written, bytes_read: what went over the drive since the start.
    Raises StoreError if the directory cannot be made or written.
    """

    tier = Tier.NVME

    def __init__(self, folder: str | os.PathLike[str], lanes: Lanes, rank: int) -> None:
        self.lanes = lanes
        self.rank = rank
        self.bytes_written = 0
        self.bytes_read = 0
        pinned = lanes.device.type == "cuda"
        self._incoming, self._outgoing = Ring(pinned), Ring(pinned)
        self._enqueue = threading.Lock()  # of what the threads share: the order on a lane, and the counts
        self._files = 0
        self._written: set[FileSlab] = set()
        base = Path(folder).expanduser()
        name = f"shardwise-{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}-rank{rank}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            _name_leftovers(base)
            self.folder = base / name
            self.folder.mkdir()
            self._lock = os.open(self.folder / "owner", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise self._error("make a directory for", base, error) from error
        self._pool = workers(lanes.device, THREADS, "shardwise-nvme")
        self._open: list[int] = [self._lock]
        self._finalizer = weakref.finalize(self, _remove, self._pool, self._open, self.folder)

    # The Store protocol.

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> FileSlab:
        nbytes = numel * dtype.itemsize
        size = -(-nbytes // PAGE) * PAGE
        self._files += 1
        path = self.folder / f"{self._files:05d}-{_plain(name)}.bin"
        file = File(path, -1, False)
        problem: StoreError | None = None
        try:
            file = self._opened(path, os.O_CREAT | os.O_RDWR)
            # Space is taken now: a full disk shows here and not in the middle of a step, and overwriting is faster.
            os.posix_fallocate(file.descriptor, 0, size)
        except OSError as error:
            problem = self._error(f"take {size / 2**20:.0f} MiB for", path, error)
        slab = FileSlab(self, numel, dtype, file, name)
        if problem is not None:
            # Told by `drain`, as a failed write is: the other ranks are on their way into a collective.
            failed: Future[None] = Future()
            failed.set_exception(problem)
            slab.writing.append(_Part(0, nbytes, failed))
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
            task = self._pool.submit(self._read, slab, first, last, piece, reading, before)
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
        slab.writing = [part for part in slab.writing if not part.future.done() or part.future.exception()]
        for first, last in _parts(offset, end):
            block = self._outgoing.take()
            with down.on():
                landing = block.memory[: last - first].view(slab.dtype)
                landing.copy_(source[(first - offset) // size : (last - offset) // size], non_blocking=True)
                last_event = down.mark()
            before = [part.future for part in slab.reading if part.meets(first, last)]
            task = self._pool.submit(self._write, slab, first, last, block, last_event, before)
            slab.writing.append(_Part(first, last, task))
        self._written.add(slab)
        return Done(last_event)

    def drain(self) -> None:
        """Return once everything that was put is on the drive. Raises StoreError for the first write that failed."""
        written, self._written = self._written, set()
        problem: BaseException | None = None
        for slab in written:
            for part in slab.writing:
                problem = problem or part.future.exception()
            slab.writing.clear()
        if problem is not None:
            raise problem

    @property
    def staging_nbytes(self) -> int:
        """Bytes of pinned memory that transfers go through; they hold nothing at rest."""
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
        block = self._incoming.take()
        try:
            file = slab.file
            skip = first % PAGE if file.direct else 0
            wanted = skip + last - first
            length = -(-wanted // PAGE) * PAGE if file.direct else wanted
            try:
                got = read_at(file.descriptor, [block.memory.numpy()[:length].data], first - skip)
            except OSError as error:
                raise self._error(f"read {slab.name} from", file.path, error) from error
            if got < wanted:
                raise StoreError(
                    f"rank {self.rank} read {got} of {wanted} bytes of {slab.name} from {file.path}: the file is "
                    "shorter than it was. Something else truncated it; go on from the last checkpoint."
                )
            with self._enqueue, self.lanes.up.on():
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
            for read in before:
                read.exception()
            if copied is not None:
                copied.synchronize()
            # The last page is written whole: the file ends with it, and nothing else lies in it.
            file = slab.file
            length = -(-(last - first) // PAGE) * PAGE if file.direct else last - first
            try:
                done = write_at(file.descriptor, [block.memory.numpy()[:length].data], first)
            except OSError as error:
                raise self._error(f"write {length} bytes to", file.path, error) from error
            if done < length:
                raise self._error(f"write {length} bytes to", file.path, OSError(errno.ENOSPC, "no space left"))
            with self._enqueue:
                self.bytes_written += done
        finally:
            self._outgoing.give(block)

    def _opened(self, path: Path, flags: int) -> File:
        """Open past the page cache where the file system has that, and through it elsewhere (tmpfs, some networks)."""
        try:
            file = File(path, os.open(path, flags | os.O_DIRECT, 0o600), True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file = File(path, os.open(path, flags, 0o600), False)
        self._open.append(file.descriptor)
        return file

    def _error(self, action: str, path: Path, error: OSError) -> StoreError:
        return StoreError(
            f"rank {self.rank} could not {action} {path}: {error.strerror or error}. Give nvme_path a directory on a drive "
            "with room that this process may write to; the last checkpoint is whole."
        )


def _parts(begin: int, end: int) -> list[tuple[int, int]]:
    """Bytes [begin, end) cut into stretches that fit a block together with what alignment adds in front."""
    size = BLOCK if begin % PAGE == 0 else BLOCK - PAGE
    return [(first, min(end, first + size)) for first in range(begin, end, size)]


def fetch_part(slab: Slab, begin: int, numel: int) -> Tensor:
    """(numel,) elements of a slab from `begin` on, on the device, there when this returns. Raises StoreError."""
    assert isinstance(slab.store, NvmeStore)
    lanes = slab.store.lanes
    out = torch.empty(numel, dtype=slab.dtype, device=lanes.device)
    lanes.up.wait(lanes.mark_compute())
    lanes.compute_waits(slab.fetch(out, begin).enqueued())
    return out


def put_part(slab: Slab, begin: int, values: Tensor) -> None:
    """Overwrite elements from `begin` on; on the drive when this returns. Raises StoreError.

    Files are written in whole pages, so what shares the first and the last page is read and written again.
    """
    assert isinstance(slab.store, NvmeStore)
    lanes, page = slab.store.lanes, PAGE // slab.dtype.itemsize
    first = begin // page * page
    last = min(-(-(begin + values.numel()) // page) * page, slab.numel)
    whole = fetch_part(slab, first, last - first)
    whole[begin - first : begin - first + values.numel()].copy_(values)
    lanes.down.wait(lanes.mark_compute())
    lanes.compute_waits(slab.put(whole, first).enqueued())
    slab.store.drain()


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[-80:]


def _remove(pool: ThreadPoolExecutor, descriptors: list[int], folder: Path) -> None:
    pool.shutdown(wait=True, cancel_futures=True)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)


def _name_leftovers(base: Path) -> None:
    """Say which directories belong to runs that were killed. They are not removed: somebody may want to look."""
    for owner in sorted(base.glob(f"shardwise-{socket.gethostname()}-*/owner")):
        try:
            descriptor = os.open(owner, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process is alive
        finally:
            os.close(descriptor)
        try:
            nbytes = sum(file.stat().st_size for file in owner.parent.glob("*.bin"))
        except OSError:
            continue  # a run that ends removes it at this moment
        log.warning(
            "%s holds %.1f GB of a run that was killed; nothing reads it again. Remove it: rm -r '%s'",
            owner.parent, nbytes / 1e9, owner.parent,
        )  # fmt: skip
