"""Large writes to a file past the page cache, by several threads, while a training goes on beside them.

    data   | edge | whole pages of the file .................. | edge |
             kept   straight from memory to the drive            kept      edges go through the cache, at the end

Through the cache the kernel copies each byte and finds a page for it, which held up the steps of a training beside it
(docs/log.md). Past it, file offsets, sizes and memory are whole pages. Data that lie otherwise in memory than in the file go
through a block of the thread's own. Edges wait, because a write through the cache would lock the file against the others.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

from . import disk

PAGE = mmap.PAGESIZE
_BLOCK_NBYTES = 8 << 20  # of a thread


class PastCache:
    """The second way into `path`, which is open for writing as `descriptor`. Any thread may write; then one calls `finish`.

    Where the file system has no such way, everything goes through the cache.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._through = descriptor
        self._direct = disk.open_past_cache(path, os.O_WRONLY)
        self._edges: list[tuple[int, bytes]] = []
        self._blocks = threading.local()

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data`, which must be writable memory, at `offset`; its edges only when `finish` is called."""
        head = min(-offset % PAGE, data.nbytes)
        whole = (data.nbytes - head) // PAGE * PAGE
        if self._direct is None or not whole:
            disk.write(self._through, data, offset, self._path)
            return
        for begin, end in ((0, head), (head + whole, data.nbytes)):
            if begin < end:
                self._edges.append((offset + begin, bytes(data[begin:end])))
        middle, offset = data[head : head + whole], offset + head
        if not address_of(middle) % PAGE:
            self._write_pages(middle, offset)
            return
        for begin in range(0, whole, _BLOCK_NBYTES):
            self._write_pages(self._moved(middle[begin : begin + _BLOCK_NBYTES]), offset + begin)

    def _write_pages(self, data: memoryview, offset: int) -> None:
        direct = self._direct
        if direct is not None:
            try:
                disk.write(direct, data, offset, self._path)
                return
            except OSError as error:
                # Refused only now, or behind a write that came to an odd end: the other way tells what is the matter.
                if error.errno != errno.EINVAL:
                    raise
        disk.write(self._through, data, offset, self._path)

    def _moved(self, data: memoryview) -> memoryview:
        """The same bytes on a page boundary, until this thread's next call."""
        block: mmap.mmap | None = getattr(self._blocks, "one", None)
        if block is None:
            block = self._blocks.one = mmap.mmap(-1, _BLOCK_NBYTES)
        found = memoryview(block)[: data.nbytes]
        ctypes.memmove(address_of(found), address_of(data), data.nbytes)  # other threads go on meanwhile
        return found

    def finish(self) -> None:
        """Write the edges. No thread writes any more."""
        edges, self._edges = self._edges, []
        for offset, data in edges:
            disk.write(self._through, memoryview(data), offset, self._path)

    def close(self) -> None:
        """Give the descriptor back; the other one is the caller's."""
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)


def address_of(data: memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(data))
