"""One directory on a drive: files, threads that read and write them, and the memory that bytes go through on their way.

    read    file --thread--> pinned block --up lane--> device       write   device --down lane--> pinned block --thread--> file

Bytes that are in host memory already, or are to come there, go between it and the file at once, where that is possible: past
the page cache whole pages only, from memory on a page boundary.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from ..files.writer import as_bytes
from ..ranks.lanes import Lanes
from .files import PAGE, File, Files
from .host import Block, Ring
from .threads import DeviceThreads

# Of each directory: drives were read faster up to four (docs/log.md), and half of the blocks stay for what comes next.
THREADS = 4

# The two calls that touch a file; tests put failing ones in their place.
read_at = os.preadv
write_at = os.pwritev


class Shared:
    """What the threads of all directories of a store share: the order on the up lane, and the first error.

    rank: of this process, for errors.
    """

    def __init__(self, lanes: Lanes, rank: int) -> None:
        self.lanes = lanes
        self.rank = rank
        self.lock = threading.Lock()
        self._fault: StoreError | None = None

    def failed(self, error: StoreError) -> StoreError:
        """What to raise for `error`: the first since one was told, for what fails later follows from it."""
        with self.lock:
            if self._fault is None:
                self._fault = error
            return self._fault

    def take_fault(self) -> StoreError | None:
        """The first error since the last call, for whoever tells it."""
        with self.lock:
            fault, self._fault = self._fault, None
        return fault


@dataclass
class Reading:
    """An Arrival whose blocks are still being read. event: of the copy that was enqueued last, under the lock."""

    futures: list[Future[None]] = field(default_factory=list)
    event: torch.Event | None = None

    def enqueued(self) -> torch.Event | None:
        wait(self.futures)  # all of them, also where one fails: afterwards no thread tells the device of another copy
        for future in self.futures:
            future.result()
        return self.event


class Drive:
    """`folder`, an existing or new directory on a drive. Nothing is seen in it: the files have no names.

    bytes_written, bytes_read: what went over the drive since the start.
    files:   the open files; a dropped one is closed.
    threads: for what reads and writes here.
    Raises StoreError if the directory cannot be made or written.
    """

    def __init__(self, folder: Path, shared: Shared) -> None:
        self.folder = folder
        self.shared = shared
        self.bytes_written = 0
        self.bytes_read = 0
        pinned = shared.lanes.device.type == "cuda"
        self._incoming, self._outgoing = Ring(pinned), Ring(pinned)
        # What goes from memory to the file at once takes no blocks, and no more memory than these would be.
        self._given = threading.Semaphore(Ring.LENGTH)
        try:
            self.files = Files(folder)
        except OSError as error:
            raise self._error("put files into", error) from error
        self.threads = DeviceThreads(THREADS, "shardwise-nvme", shared.lanes.device)

    @property
    def staging_nbytes(self) -> int:
        return self._incoming.nbytes + self._outgoing.nbytes

    # Memory of writes. Threads give it back, as soon as its bytes are on the drive.

    def take_block(self) -> Block:
        """Memory for the bytes of one write; waits until there is some."""
        return self._outgoing.take()

    def give_block(self, block: Block) -> None:
        self._outgoing.give(block)

    def take_turn(self) -> None:
        """Wait until another write may keep memory that was given."""
        self._given.acquire()

    def give_turn(self) -> None:
        self._given.release()

    # On the threads. name: of the slab, for errors.

    def read(self, file: File, offset: int, out: Tensor, name: str, reading: Reading) -> None:
        """Copy the file's bytes from `offset` on into `out`, (n,) uint8 on the device, as a part of `reading`."""
        host = bytes_of(out) if self.shared.lanes.device.type == "cpu" else None
        if host is not None and in_place(file, offset, host):
            self._fill(file, offset, host, len(host), name)
            torch.autograd.graph.increment_version(out)
            return
        block = self._incoming.take()
        try:
            skip = self._fill_block(file, offset, block, out.numel(), name)
            block.event = self.give(block.memory[skip : skip + out.numel()], out, reading) or block.event
        finally:
            self._incoming.give(block)

    def give(self, memory: Tensor, out: Tensor, reading: Reading) -> torch.Event | None:
        """Copy bytes in host memory into `out`, as a part of `reading`; the event of the copy, where the device makes it."""
        lanes = self.shared.lanes
        if lanes.device.type == "cpu":
            # Not torch's copy: each of these threads would begin threads of its own for it.
            np.copyto(bytes_of(out), memory.numpy())
            torch.autograd.graph.increment_version(out)
            return None
        # The target may be of torch.inference_mode, as in an evaluation, or not: inside of it both may be written.
        with self.shared.lock, lanes.up.on(), torch.inference_mode():
            out.copy_(memory, non_blocking=True)
            reading.event = lanes.up.mark()
            return reading.event

    def _fill_block(self, file: File, offset: int, block: Block, nbytes: int, name: str) -> int:
        """Read `nbytes` and what alignment adds; gives how many bytes that is in front."""
        skip = offset % PAGE if file.direct else 0
        length = -(-(skip + nbytes) // PAGE) * PAGE if file.direct else nbytes
        self._fill(file, offset - skip, block.memory.numpy()[:length], skip + nbytes, name)
        return skip

    def _fill(self, file: File, offset: int, memory: np.ndarray, wanted: int, name: str) -> None:
        got, problem = _moved(read_at, file, memory.data, offset, wanted)
        if problem is None and got < wanted:
            problem = OSError(errno.EIO, f"it ends after {got:,} of them and is shorter than it was")
        if problem is not None:
            raise self.failed(f"read {wanted:,} bytes of {name} in", problem, file.path)
        with self.shared.lock:
            self.bytes_read += got

    def write(self, file: File, offset: int, memory: np.ndarray, nbytes: int, name: str) -> None:
        """Write the first `nbytes` of `memory`, (n,) uint8 of a block or `in_place`."""
        # The last page is written whole: the file ends with it, and nothing else lies in it.
        length = -(-nbytes // PAGE) * PAGE if file.direct else nbytes
        done, problem = _moved(write_at, file, memory[:length].data, offset, length)
        if problem is None and done < length:
            problem = OSError(errno.EIO, f"it took {done:,} of them and no more")
        if problem is not None:
            raise self.failed(f"write {length:,} bytes of {name} in", problem)
        with self.shared.lock:
            self.bytes_written += done

    # Errors.

    def failed(self, action: str, error: OSError, path: Path | None = None) -> StoreError:
        """What to raise where `action` failed: the store's first error since one was told. path: of a file that is not ours."""
        return self.shared.failed(self._error(action, error, path))

    def _error(self, action: str, error: OSError, path: Path | None = None) -> StoreError:
        remedy = "Give nvme_path a directory on a drive with room that this process may write to"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "Raise the limit of open files (ulimit -n): each shard is a file on each drive"
        elif path is not None:
            remedy = "Leave the model's files as they are while a run reads them, or set offload_param_source: copy"
        elif error.errno == errno.EIO:
            remedy = "Go on with nvme_path on another drive"
        why = error.strerror or error
        made = StoreError(
            f"rank {self.shared.rank} could not {action} {path or self.folder}: {why}. {remedy}; the last checkpoint is whole."
        )
        made.__cause__ = error
        return made

    def close(self) -> None:
        self.threads.close()
        self.files.close()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, (nbytes,), to be read and written; its storage can still be resized."""
    return np.frombuffer(as_bytes(tensor), np.uint8)


def in_place(file: File, offset: int, memory: np.ndarray) -> bool:
    """Whether the file's bytes from `offset` on can be read into, or written from, this memory as it lies there."""
    return not file.direct or not (offset % PAGE or len(memory) % PAGE or memory.ctypes.data % PAGE)


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
