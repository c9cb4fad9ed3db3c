"""Shards that rest in files: aligned, preallocated, read and written past the page cache, several blocks at once.

    fetch   disk --thread--> pinned block --up lane--> device        put   device --down lane--> pinned block --thread--> disk

A slab has a file of its own in each directory, of whole pages and without a name (`files.py`): they go with the last reference
to the slab, or with the process, however that ends. Its blocks lie in the directories in turn (`striping.py`), so that several
drives work for one slab. They go through two rings of pinned buffers for each directory, one for each way (`drive.py`), so that
no transfer is longer than a ring and a slab of any size needs the same host memory. Where the device is the host, whole pages
that nobody else writes go without a copy.

Errors of the disk are StoreError. A read's is raised by whoever waits for the bytes, a write's by `drain`, or by the next
read of the slab: never by a thread, and never in the middle of a collective. Of several the first is told, for the others
follow from it; and bytes that could not be written stay unreadable until they are written anew.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.offloads import Directories, directories_of
from ..errors import StoreError
from ..plan.plan import Tier
from ..ranks.lanes import Lanes
from .drive import Drive, Reading, Shared, bytes_of, in_place
from .files import PAGE, File, take_space
from .pinned import host_room
from .store import Arrival, Done, Slab
from .striping import Stretch, file_sizes, stretches

log = logging.getLogger("shardwise")


class FileSlab(Slab):
    """A slab that is a file of its own on each drive where it has bytes.

    name:  what errors call it. start: the drive of its first block.
    files: by the number of the drive; empty where they could not be made: then every byte of it is in `writing`, as failed.
    """

    store: NvmeStore

    def __init__(self, store: NvmeStore, numel: int, dtype: torch.dtype, name: str, start: int) -> None:
        super().__init__(store, Tier.NVME, numel, dtype)
        self.name = name
        self.start = start
        self.files: dict[int, File] = {}
        self.writing: list[_Part] = []  # writes under way, and those that failed
        self.reading: list[_Part] = []

    def room(self, numel: int, device: torch.device) -> list[Tensor]:
        return [host_room(numel, self.dtype)] if device.type == "cpu" else super().room(numel, device)

    def put_parts(self, parts: Sequence[Tensor], begin: int = 0, *, given: bool = False) -> torch.Event | None:
        return self.store.put(parts[0], self, begin, given=given).enqueued()

    def read_part(self, begin: int, numel: int) -> Tensor:
        lanes = self.store.lanes
        (out,) = self.room(numel, lanes.device)
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
        lanes.compute_waits(self.put_parts([whole], first, given=True))
        self.store.drain()

    def stretches(self, begin: int, end: int) -> list[Stretch]:
        """Where its bytes [begin, end) lie."""
        return stretches(begin, end, len(self.store.drives), self.start)

    def bring(self, part: Stretch, out: Tensor, reading: Reading) -> None:
        """Read a stretch of it into `out`, bytes on the device, as a part of `reading`. Raises StoreError."""
        self.store.drives[part.drive].read(self.files[part.drive], part.offset, out, self.name, reading)

    def about_to_be_written(self, first: int, last: int) -> None:
        """Something is to be put into its bytes [first, last)."""


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


class NvmeStore:
    """Slabs in files below one directory or several, whose drives share each slab.

    folders: one directory, existing or new; or several, which must exist, each on a drive of its own.
    rank:    of this process, for errors.
    drives:  one for each directory, with the open files there.
    Raises StoreError if a directory cannot be used, or is given twice.
    """

    tier = Tier.NVME

    def __init__(self, folders: Directories, lanes: Lanes, rank: int) -> None:
        self.lanes = lanes
        self._shared = Shared(lanes, rank)
        self._allocated = 0
        self._written: set[FileSlab] = set()
        paths = [Path(folder).expanduser() for folder in directories_of(folders)]
        _check_several(paths, rank)
        self.drives = tuple(Drive(path, self._shared) for path in paths)
        self._finalizer = weakref.finalize(self, _end, self.drives)

    # The Store protocol.

    def allocate(self, numel: int, dtype: torch.dtype, name: str) -> FileSlab:
        # Slabs of one block, too, lie on all drives in turn.
        slab = FileSlab(self, numel, dtype, name, self._allocated % len(self.drives))
        self._allocated += 1
        self.make_files(slab)
        return slab

    def make_files(self, slab: FileSlab) -> None:
        """Give a slab its files, with room for all of it."""
        made: dict[int, File] = {}
        for number, (drive, size) in enumerate(
            zip(self.drives, file_sizes(slab.nbytes, len(self.drives), slab.start), strict=True)
        ):
            if size == 0 and number != slab.start:
                continue
            nbytes = -(-size // PAGE) * PAGE
            try:
                made[number] = drive.files.make()
                # Space is taken now: a full disk shows here and not in the middle of a step, and overwriting is faster.
                take_space(made[number], nbytes)
            except OSError as error:
                # Told by `drain`, as a failed write is: the other ranks are on their way into a collective.
                failed: Future[None] = Future()
                # Without its traceback, whose frames would keep the files that could be made.
                failed.set_exception(
                    drive.failed(f"take {nbytes:,} bytes for {slab.name} in", error.with_traceback(None))
                )
                slab.writing.append(_Part(0, slab.nbytes, failed))
                self._written.add(slab)
                return
        slab.files = made

    def fetch(self, slab: Slab, out: Tensor, begin: int = 0) -> Arrival:
        assert isinstance(slab, FileSlab)
        target = out.view(torch.uint8)
        reading = Reading()
        offset = begin * slab.dtype.itemsize
        slab.reading = [part for part in slab.reading if not part.future.done()]
        for part in slab.stretches(offset, offset + target.numel()):
            piece = target[part.first - offset : part.last - offset]
            before = [other.future for other in slab.writing if other.meets(part.first, part.last)]
            task = self.drives[part.drive].threads.submit(partial(self._read, slab, part, piece, reading, before))
            reading.futures.append(task)
            slab.reading.append(_Part(part.first, part.last, task))
        return reading

    def put(self, source: Tensor, slab: Slab, begin: int = 0, *, given: bool = False) -> Arrival:
        """See `Store.put`. given: nobody writes `source` any more, so its bytes may be read until they are on the drive."""
        assert isinstance(slab, FileSlab)
        size = slab.dtype.itemsize
        offset, end = begin * size, (begin + source.numel()) * size
        assert offset % PAGE == 0, "only whole pages are written"
        assert end % PAGE == 0 or end == slab.nbytes, "only whole pages are written"
        slab.about_to_be_written(offset, end)
        last_event = None
        if not slab.files:
            self._written.add(slab)
            return Done(None)
        # A write that failed is made good by one of the same bytes.
        slab.writing = [
            part
            for part in slab.writing
            if not part.future.done() or (part.future.exception() and not part.lies_in(offset, end))
        ]
        for part in slab.stretches(offset, end):
            piece = source[(part.first - offset) // size : (part.last - offset) // size]
            under_way = (*slab.reading, *slab.writing)
            before = [other.future for other in under_way if other.meets(part.first, part.last)]
            memory, copied, lastly = self._leaving(slab, part, piece, given)
            last_event = copied or last_event
            write = partial(self._write, slab, part, memory, copied, before)
            task = self.drives[part.drive].threads.submit(write, lastly)
            slab.writing.append(_Part(part.first, part.last, task))
        self._written.add(slab)
        return Done(last_event)

    def _leaving(
        self, slab: FileSlab, part: Stretch, piece: Tensor, given: bool
    ) -> tuple[np.ndarray, torch.Event | None, Callable[[], None]]:
        """`piece` in memory that can be written from: itself or a block, with the event of the copy, and what gives it back."""
        drive, down = self.drives[part.drive], self.lanes.down
        # The bytes on the host, where they are there as they are to rest.
        host = bytes_of(piece) if piece.device.type == "cpu" and piece.dtype == slab.dtype else None
        if given and host is not None and in_place(slab.files[part.drive], part.offset, host):
            drive.take_turn()
            return host, down.mark(), drive.give_turn
        block = drive.take_block()
        landing = block.memory[: part.last - part.first]
        if host is not None and self.lanes.device.type == "cpu":
            # Not torch's copy: it waits for threads of its own, which have no core while the drive's threads and others do.
            np.copyto(landing.numpy(), host)
        else:
            with down.on():
                landing.view(slab.dtype).copy_(piece, non_blocking=True)
        return block.memory.numpy(), down.mark(), partial(drive.give_block, block)

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
        return self._shared.take_fault()

    @property
    def staging_nbytes(self) -> int:
        return sum(drive.staging_nbytes for drive in self.drives)

    @property
    def bytes_written(self) -> int:
        """What went over the drives since the start."""
        return sum(drive.bytes_written for drive in self.drives)

    @property
    def bytes_read(self) -> int:
        """What came over the drives since the start."""
        return sum(drive.bytes_read for drive in self.drives)

    @property
    def open_files(self) -> int:
        return sum(len(drive.files) for drive in self.drives)

    @property
    def nbytes(self) -> int:
        """What the open files take on the drives."""
        return sum(drive.files.nbytes for drive in self.drives)

    def close(self) -> None:
        self._finalizer()

    # On the threads. before: what moves the same bytes, one of the two writing; begun earlier, so it needs no thread here.

    def _read(
        self, slab: FileSlab, part: Stretch, out: Tensor, reading: Reading, before: Sequence[Future[None]]
    ) -> None:
        for write in before:
            write.result()
        slab.bring(part, out, reading)

    def _write(
        self,
        slab: FileSlab,
        part: Stretch,
        memory: np.ndarray,
        copied: torch.Event | None,
        before: Sequence[Future[None]],
    ) -> None:
        for other in before:
            other.exception()
        if copied is not None:
            copied.synchronize()
        self.drives[part.drive].write(slab.files[part.drive], part.offset, memory, part.last - part.first, slab.name)


def _check_several(paths: Sequence[Path], rank: int) -> None:
    """Raises StoreError for a directory of several that is missing, or that is another one by a second name."""
    if len(paths) < 2:
        return
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            found = os.stat(path)
        except OSError as error:
            raise StoreError(
                f"rank {rank} could not put files into {path}: {error.strerror}. Each of several paths must exist, because "
                "it is on a drive of its own: mount the drive or make the directory, or take the path out of nvme_path."
            ) from error
        place = found.st_dev, found.st_ino
        if place in seen:
            both = f"{seen[place]} and {path}"
            raise StoreError(f"rank {rank}: {both} of nvme_path are one directory. Give each drive once.")
        seen[place] = path
    if rank == 0 and len({device for device, _ in seen}) < len(seen):
        names = ", ".join(map(str, paths))
        log.warning("nvme_path: several of %s are on one file system, which several paths make no faster.", names)


def _end(drives: Sequence[Drive]) -> None:
    for drive in drives:
        drive.close()
