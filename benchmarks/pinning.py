"""What does it cost to make pinned host memory: its first touch, or its registration? And what do several threads gain?

    torchrun --nproc_per_node 2 benchmarks/pinning.py             all ranks at once, as a run does
    torchrun --nproc_per_node 2 benchmarks/pinning.py --gib 16

Prints one JSON line per way and rank 0's seconds for each part. Each way runs twice: a virtual machine may get its memory only
when it is touched for the first time, which the second time does not see. Without CUDA nothing is registered.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from place import Place
from shardwise.offload.pinned import populate

PIECE = 1 << 30


def made(nbytes: int, *, threads: int, register_threads: int, cuda: bool) -> dict[str, float]:
    """Seconds of the parts of one buffer of `nbytes`. threads: that touch pages before; 0: the registration does."""
    memory = mmap.mmap(-1, nbytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    begin = -array.ctypes.data % (2 << 20)
    address = array.ctypes.data + begin
    started = time.perf_counter()
    if threads:
        populate(address, nbytes, threads)
    touched = time.perf_counter()
    registered = touched
    pieces = [(address + at, min(PIECE, nbytes - at)) for at in range(0, nbytes, PIECE)]
    if cuda:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if register_threads == 1:
            pieces = [(address, nbytes)]
        device = torch.cuda.current_device()

        def register(piece: tuple[int, int]) -> None:
            torch.cuda.set_device(device)
            if code := int(runtime.cudaHostRegister(*piece, 0)):
                raise RuntimeError(f"CUDA error {code}")

        with ThreadPoolExecutor(register_threads) as pool:
            list(pool.map(register, pieces))
        registered = time.perf_counter()
        for start, _ in pieces:
            runtime.cudaHostUnregister(start)
    ended = time.perf_counter()
    del array
    memory.close()
    return {"touch_s": touched - started, "register_s": registered - touched, "unregister_s": ended - registered}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--gib", type=float, default=8.0, help="of one rank")
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args(argv)
    place = Place.join(use_cpu=options.use_cpu)
    nbytes = int(options.gib * 2**30) // 4096 * 4096
    ways = [(0, 1), (0, 1), (1, 1), (4, 1), (8, 1), (16, 1), (0, 8), (8, 8)]
    for threads, register_threads in ways if place.cuda else ways[2:6]:
        dist.barrier()
        parts = made(nbytes, threads=threads, register_threads=register_threads, cuda=place.cuda)
        rates = {key: round(value, 3) for key, value in parts.items()}
        total = nbytes / 1e9 / max(parts["touch_s"] + parts["register_s"], 1e-9)
        line = {"benchmark": "pinning", "touching": threads, "registering": register_threads, **rates}
        place.say(json.dumps({**line, "gb_per_s": round(total, 2), "gib": options.gib}))
    place.leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
