"""Host memory of an exact size, page-locked where there is a GPU.

torch rounds pinned allocations up to a power of two, which can double a slab of many gigabytes. So a slab is ordinary memory
that is registered with CUDA, and unregistered when it is freed: by whoever lets go of it last, at any moment, so the memory
itself waits for the copies that still use it.

Most of what registering takes is that the kernel finds and clears each page, on one core. So several threads touch large
memory before, in huge pages where the kernel gives them: what that is worth, `benchmarks/pinning.py` measures.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from .files import PAGE

_HUGE = 2 << 20
_LARGE = 64 << 20  # bytes from which threads pay
_TOUCHING = 8  # threads at most
_POPULATE_WRITE = 23  # of madvise, Linux 5.14; Python's mmap has no name for it

# Of copies that use some memory, by whatever tells them apart: the slab's or the block's own, so that it is always up to date.
Copies = Mapping[Any, torch.Event | None]


def host_room(numel: int, dtype: torch.dtype) -> Tensor:
    """(numel,) in host memory on a page boundary, not pinned, with nothing in it yet: files are read into it as it lies."""
    nbytes = numel * dtype.itemsize
    memory = np.empty(nbytes + PAGE, dtype=np.uint8)
    skip = -memory.ctypes.data % PAGE
    return torch.from_numpy(memory[skip : skip + nbytes]).view(dtype)


def host_tensor(numel: int, dtype: torch.dtype, *, pinned: bool, copies: Iterable[Copies] = ()) -> Tensor:
    """(numel,) zeros in host memory of the exact size, on a page boundary. Raises StoreError if it cannot be pinned.

    copies: of the device from and to it; when its last view goes, it is given back once all of them are done.
    """
    nbytes = numel * dtype.itemsize
    memory = mmap.mmap(-1, _room_of(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array, begin = _prepared(memory, nbytes, pinned, copies)
    return torch.from_numpy(array[begin : begin + nbytes]).view(dtype)


@dataclass(frozen=True)
class SharedMemory:
    """Bytes that another process can map: `tensor` is what is in the file `descriptor` from `begin` on, whole pages."""

    tensor: Tensor
    descriptor: int
    begin: int


def shared_memory(nbytes: int, *, pinned: bool, copies: Iterable[Copies] = ()) -> SharedMemory:
    """As `host_tensor`, in a file without a name that is in memory; it is emptied when the last view of the tensor goes.

    Raises StoreError, OSError where there are no such files.
    """
    descriptor, room = os.memfd_create("shardwise", os.MFD_CLOEXEC), _room_of(nbytes)
    try:
        os.ftruncate(descriptor, room)
        memory = mmap.mmap(descriptor, room, flags=mmap.MAP_SHARED)
    except BaseException:
        os.close(descriptor)
        raise
    # Before what unregisters it is: of the finalizers of an object the last one is called first.
    weakref.finalize(memory, _empty, descriptor, room, os.getpid()).atexit = False
    array, begin = _prepared(memory, nbytes, pinned, copies)
    return SharedMemory(torch.from_numpy(array[begin : begin + nbytes]), descriptor, begin)


def _empty(descriptor: int, room: int, process: int) -> None:
    """Give the pages back, and close the file. process: whose they are; another that lets go of its view takes nothing away.

    One that was forked meanwhile, as a loader's worker is, has the file open and mapped as long as it lives, and the pages
    would stay with it. It never looks at them; if it did, it would find zeros, for the file is as long as before.
    """
    if os.getpid() == process:
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, room)
    os.close(descriptor)


def _room_of(nbytes: int) -> int:
    """More than needed, so that the range starts on an edge and no other allocation shares a registered page."""
    return -(-nbytes // PAGE) * PAGE + _edge_of(nbytes)


def _edge_of(nbytes: int) -> int:
    return _HUGE if nbytes >= _LARGE else PAGE


def _prepared(memory: mmap.mmap, nbytes: int, pinned: bool, copies: Iterable[Copies]) -> tuple[np.ndarray, int]:
    """A mapping as an array, and where in it `nbytes` begin, on an edge, and pinned if that is asked."""
    large = nbytes >= _LARGE
    if large:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    skip = -array.ctypes.data % _edge_of(nbytes)
    if pinned:
        address = array.ctypes.data + skip
        if large:
            populate(address, nbytes, min(_TOUCHING, len(os.sched_getaffinity(0))))
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, max(nbytes, 1), 0))
        if code != 0:
            raise StoreError(
                f"{nbytes / 2**20:.0f} MiB of host memory could not be pinned (CUDA error {code}). Raise the limit of "
                "locked memory (`ulimit -l`, or --ulimit memlock=-1 in a container), or offload less."
            )
        # Not at exit: the driver does it then, and a copy behind a collective whose other ranks are gone never ends.
        weakref.finalize(memory, _unregister, address, torch.cuda.current_device(), tuple(copies)).atexit = False
    return array, skip


def populate(address: int, nbytes: int, threads: int) -> None:
    """Have the kernel give memory to each page of a range, by several threads; nothing where it knows no such call."""
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    piece = -(-nbytes // threads // _HUGE) * _HUGE or _HUGE
    pieces = [(address + at, min(piece, nbytes - at)) for at in range(0, nbytes, piece)]
    with ThreadPoolExecutor(threads, thread_name_prefix="shardwise-pages") as pool:  # ctypes lets the interpreter go
        list(pool.map(lambda part: advise(*part, _POPULATE_WRITE), pieces))


def _unregister(address: int, device: int, copies: Iterable[Copies]) -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):  # on whatever thread this runs
            with contextlib.suppress(RuntimeError):  # of a device that has failed: it copies nothing any more
                for event in chain.from_iterable(found.values() for found in copies):
                    if event is not None:
                        event.synchronize()
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
