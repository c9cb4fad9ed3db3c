"""How much of a drive does the NVMe tier use? Its transfers beside plain direct I/O, same blocks, same threads, in turn.

    python benchmarks/drive.py --folder /mnt/nvme
    python benchmarks/drive.py --mib 256 --rounds 2

`plain` reads and writes one preallocated file with as many threads as the tier has, from buffers that are there already.
`tier` is `NvmeStore`: the same file sizes through the rings of pinned blocks, to and from a tensor on the device. Prints a JSON
line for each way: the medians over the rounds in GB/s (10^9 bytes) and their ratio.
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

from shardwise.offload.host import BLOCK
from shardwise.offload.nvme import THREADS, NvmeStore
from shardwise.ranks.lanes import Lanes


def timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def plain(folder: Path, nbytes: int) -> dict[str, Callable[[], None]]:
    """write and read of one file by THREADS threads, BLOCK bytes at a time."""
    file = tempfile.NamedTemporaryFile(dir=folder)  # noqa: SIM115 - it goes with the process
    os.posix_fallocate(file.fileno(), 0, nbytes)
    handle = os.open(file.name, os.O_RDWR | os.O_DIRECT)
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(THREADS)]
    for buffer in buffers:
        buffer.write(os.urandom(1 << 16) * (BLOCK >> 16))

    def run(call: Callable[..., int]) -> None:
        def lane(number: int) -> None:
            for offset in range(number * BLOCK, nbytes, THREADS * BLOCK):
                call(handle, [buffers[number]], offset)

        threads = [threading.Thread(target=lane, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not file.closed

    return {"write": lambda: run(os.pwritev), "read": lambda: run(os.preadv)}


def tier(folder: Path, nbytes: int) -> tuple[NvmeStore, dict[str, Callable[[], None]]]:
    lanes = Lanes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = lanes.device
    store = NvmeStore(folder, lanes, 0)
    slab = store.allocate(nbytes, torch.uint8, "benchmark")
    tensor = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def write() -> None:
        slab.put(tensor).enqueued()
        store.drain()

    def read() -> None:
        slab.fetch(tensor).enqueued()
        wait()

    return store, {"write": write, "read": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=2048, help="size of each file, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    nbytes = options.mib << 20
    store, ours = tier(options.folder, nbytes)
    theirs = plain(options.folder, nbytes)
    for way in ("write", "read"):
        seconds: dict[str, list[float]] = {"plain": [], "tier": []}
        for _ in range(options.rounds + 1):
            seconds["plain"].append(timed(theirs[way]))
            seconds["tier"].append(timed(ours[way]))
        rate = {name: nbytes / 1e9 / statistics.median(found[1:]) for name, found in seconds.items()}
        line = {"way": way, **{f"{name}_gb_per_s": round(value, 2) for name, value in rate.items()}}
        line["ratio"] = round(rate["tier"] / rate["plain"], 2)
        print(json.dumps({**line, "block": BLOCK, "threads": THREADS, "folder": str(options.folder)}), flush=True)
    store.close()


if __name__ == "__main__":
    main()
