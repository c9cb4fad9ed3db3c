"""How much of a drive does the NVMe tier use? Its transfers beside plain direct I/O, same blocks, same threads, in turn.

    python benchmarks/drive.py --folder /mnt/nvme
    python benchmarks/drive.py --folder /mnt/nvme0 --folder /mnt/nvme1
    python benchmarks/drive.py --use-cpu --mib 256 --rounds 2

`plain` reads and writes a preallocated file in each folder with as many threads as the tier has there, from buffers that are
there already. `tier` is `NvmeStore`: as many bytes through its rings of pinned blocks, to and from a tensor on the device.
`in_place`, where the device is the host: to and from memory on page boundaries, which needs no blocks. Prints a JSON line for
each way: medians over the rounds in GB/s (10^9 bytes), and those of the ratios to the plain run of the same round, with the
least and the most.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shardwise.offload.drive import THREADS
from shardwise.offload.files import File, Files
from shardwise.offload.nvme import NvmeStore
from shardwise.offload.pinned import host_room
from shardwise.offload.striping import BLOCK
from shardwise.ranks.lanes import Lanes

Ways = dict[str, Callable[[], None]]


def timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def plain(folders: list[Path], nbytes: int, threads: int) -> Ways:
    """write and read of a file in each folder by `threads` threads there, BLOCK bytes at a time."""
    each = nbytes // len(folders) // BLOCK * BLOCK
    made: list[File] = []
    for folder in folders:
        made.append(Files(folder).make())
        os.posix_fallocate(made[-1].descriptor, 0, each)
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(threads * len(folders))]
    for buffer in buffers:
        buffer.write(os.urandom(1 << 16) * (BLOCK >> 16))

    def run(call: Callable[..., int]) -> None:
        def lane(file: File, number: int, buffer: mmap.mmap) -> None:
            for offset in range(number * BLOCK, each, threads * BLOCK):
                assert call(file.descriptor, [buffer], offset) == BLOCK

        lanes = [(file, number) for file in made for number in range(threads)]
        begun = [threading.Thread(target=lane, args=(*one, buffer)) for one, buffer in zip(lanes, buffers, strict=True)]
        for thread in begun:
            thread.start()
        for thread in begun:
            thread.join()

    return {"write": lambda: run(os.pwritev), "read": lambda: run(os.preadv)}


def tier(store: NvmeStore, nbytes: int, *, in_place: bool) -> Ways:
    """write and read of one slab. in_place: from and to memory that a file can be read into as it lies."""
    device = store.lanes.device
    slab = store.allocate(nbytes, torch.uint8, "benchmark")
    store.drain()
    tensor = host_room(nbytes, torch.uint8) if in_place else torch.empty(nbytes, dtype=torch.uint8, device=device)
    tensor.random_(0, 255)

    def write() -> None:
        slab.put_parts([tensor], given=in_place)
        store.drain()

    def read() -> None:
        slab.fetch(tensor).enqueued()
        store.lanes.synchronize()

    return {"write": write, "read": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, action="append", help="several times: one file is striped over them")
    parser.add_argument("--mib", type=int, default=2048, help="size of each file, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS, help="of plain direct I/O, for each folder")
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args()
    folders = options.folder or [Path(tempfile.gettempdir())]
    nbytes = options.mib << 20
    cuda = torch.cuda.is_available() and not options.use_cpu
    store = NvmeStore(folders, Lanes(torch.device("cuda" if cuda else "cpu")), 0)
    ours = {"plain": plain(folders, nbytes, options.threads), "tier": tier(store, nbytes, in_place=False)}
    if not cuda:
        ours["in_place"] = tier(store, nbytes, in_place=True)
    for way in ("write", "read"):
        seconds: dict[str, list[float]] = {name: [] for name in ours}
        for _ in range(options.rounds + 1):
            for name, ways in ours.items():
                seconds[name].append(timed(ways[way]))
        line: dict[str, object] = {"way": way}
        for name, found in seconds.items():
            line[f"{name}_gb_per_s"] = round(nbytes / 1e9 / statistics.median(found[1:]), 2)
        for name, found in seconds.items():
            if name != "plain":
                ratios = [first / second for first, second in zip(seconds["plain"][1:], found[1:], strict=True)]
                line[f"{name}_ratio"] = round(statistics.median(ratios), 2)
                line[f"{name}_ratios"] = [round(min(ratios), 2), round(max(ratios), 2)]
        where = {"block": BLOCK, "threads": THREADS, "folders": [str(folder) for folder in folders]}
        print(json.dumps({**line, **where, "device": str(store.lanes.device)}), flush=True)
    store.close()


if __name__ == "__main__":
    main()
