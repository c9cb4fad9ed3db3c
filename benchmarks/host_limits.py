"""What bounds an offloaded step on this machine: the link to the GPU, the memory of the host, its cores, or its disk?

    python benchmarks/host_limits.py                      everything; on a machine without CUDA, the host's part
    python benchmarks/host_limits.py --folder /mnt/nvme   where the disk is measured
    torchrun --nproc_per_node 2 benchmarks/host_limits.py --only link     all GPUs of a machine at once

Prints one JSON line per question. Rates are GB/s (10^9 bytes) of what crosses the link or the disk, and 10^9 parameters a
second for optimizer steps. An AdamW step of one parameter with fp32 states moves, per parameter,

    stepped on the host:     master, two moments, gradient read (16 bytes), master and moments written (12)
    streamed through a GPU:  the same 16 bytes up the link and 12 down, each way at once
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.offload.host import HostStore
from shardwise.ranks.lanes import Lanes

GB = 1e9


def best_of(run: Callable[[], None], times: int = 3) -> float:
    """Seconds of the fastest of `times` runs after one that is not counted."""
    run()
    seconds = []
    for _ in range(times):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def say(question: str, **answer: object) -> None:
    rank = {"rank": dist.get_rank()} if dist.is_initialized() else {}
    print(json.dumps({"question": question, **answer, **rank}), flush=True)


def link(nbytes: int) -> None:
    """Pinned copies: up, down, and both at once."""
    store = HostStore(Lanes(torch.device("cuda", torch.cuda.current_device())))
    host = [store.allocate(nbytes, torch.uint8, "link").tensor for _ in range(2)]
    device = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    up, down = torch.cuda.Stream(), torch.cuda.Stream()

    def send() -> None:
        with torch.cuda.stream(up):
            device[0].copy_(host[0], non_blocking=True)

    def bring() -> None:
        with torch.cuda.stream(down):
            host[1].copy_(device[1], non_blocking=True)

    def both() -> None:
        send()
        bring()

    for name, run in (("up", send), ("down", bring), ("both ways, each", both)):
        say(f"link, {name}", gb_per_s=round(nbytes / GB / best_of(run), 1))


def host_copy(nbytes: int) -> None:
    a, b = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    seconds = best_of(lambda: b.copy_(a))
    say(
        "host memory, copy, read and written bytes",
        gb_per_s=round(2 * nbytes / GB / seconds, 1),
        threads=torch.get_num_threads(),
    )


def states(numel: int, pinned: bool) -> list[Tensor]:
    """master, first moment, second moment, gradient."""
    store = HostStore(Lanes(torch.device("cuda" if pinned else "cpu")))
    found = [store.allocate(numel, torch.float32, "state").tensor for _ in range(4)]
    for tensor in found:
        tensor.fill_(0.5)
    return found


def adamw(tensors: list[Tensor], step: Tensor) -> None:
    master, first, second, grad = ([t] for t in tensors)
    torch._fused_adamw_(
        master, grad, first, second, [], [step],
        lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


def step_on_host(numel: int) -> None:
    tensors = states(numel, pinned=False)
    step = torch.ones(())
    seconds = best_of(lambda: adamw(tensors, step))
    say("AdamW on the host", gparam_per_s=round(numel / GB / seconds, 2), threads=torch.get_num_threads())


class Streamed:
    """AdamW on states that rest in host memory, run on the GPU chunk by chunk."""

    def __init__(self, tensors: list[Tensor], chunk: int, depth: int) -> None:
        self.tensors, self.chunk = tensors, chunk
        self.up, self.work, self.down = (torch.cuda.Stream() for _ in range(3))
        self.ring = [[torch.empty(chunk, dtype=torch.float32, device="cuda") for _ in tensors] for _ in range(depth)]
        self.free: list[torch.cuda.Event | None] = [None] * depth
        self.step = torch.ones((), device="cuda")

    def run(self) -> None:
        numel = self.tensors[0].numel()
        for number, begin in enumerate(range(0, numel, self.chunk)):
            slot = number % len(self.ring)
            end = min(begin + self.chunk, numel)
            staged = [t[: end - begin] for t in self.ring[slot]]
            with torch.cuda.stream(self.up):
                if self.free[slot] is not None:
                    self.up.wait_event(self.free[slot])
                for stage, tensor in zip(staged, self.tensors, strict=True):
                    stage.copy_(tensor[begin:end], non_blocking=True)
                arrived = self.up.record_event()
            with torch.cuda.stream(self.work):
                self.work.wait_event(arrived)
                adamw(staged, self.step)
                stepped = self.work.record_event()
            with torch.cuda.stream(self.down):
                self.down.wait_event(stepped)
                for stage, tensor in zip(staged[:3], self.tensors[:3], strict=True):
                    tensor[begin:end].copy_(stage, non_blocking=True)
                self.free[slot] = self.down.record_event()


def step_through_gpu(numel: int) -> None:
    tensors = states(numel, pinned=True)
    for chunk, depth in ((2 << 20, 4), (8 << 20, 3), (32 << 20, 3)):
        streamed = Streamed(tensors, chunk, depth)
        seconds = best_of(streamed.run)
        say("AdamW streamed through the GPU", chunk=chunk, depth=depth, gparam_per_s=round(numel / GB / seconds, 2))
    # Both at once: what is left of the host's memory when the link takes its share.
    step = torch.ones(())
    streamed = Streamed(tensors, 8 << 20, 3)
    for share in (0.2, 0.3, 0.4):
        cut = int(numel * share)
        mine = [t[:cut] for t in tensors]
        streamed.tensors = [t[cut:] for t in tensors]

        def both(mine: list[Tensor] = mine) -> None:
            worker = threading.Thread(target=adamw, args=(mine, step))
            worker.start()
            streamed.run()
            worker.join()

        say(
            "AdamW, a share on the host at the same time",
            share=share,
            gparam_per_s=round(numel / GB / best_of(both), 2),
        )


def disk(folder: Path, nbytes: int, block: int) -> None:
    """Direct reads and writes of one preallocated file, with several in flight."""
    for depth in (1, 2, 4):
        buffers = [mmap.mmap(-1, block) for _ in range(depth)]  # anonymous maps start on a page, as direct I/O wants
        for buffer in buffers:
            buffer.write(os.urandom(1 << 16) * (block >> 16))
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            try:
                handle = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            except OSError as error:
                say("disk", folder=str(folder), error=str(error))
                return
            for name, call in (("write", os.pwritev), ("read", os.preadv), ("overwrite", os.pwritev)):
                begin = time.perf_counter()
                threads = [
                    threading.Thread(
                        target=_blocks, args=(call, handle, buffer, range(i * block, nbytes, depth * block))
                    )
                    for i, buffer in enumerate(buffers)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                seconds = time.perf_counter() - begin
                say(f"disk, {name}", gb_per_s=round(nbytes / GB / seconds, 2), depth=depth, block=block)
            os.close(handle)


def _blocks(call: Callable[..., int], handle: int, buffer: mmap.mmap, offsets: range) -> None:
    for offset in offsets:
        call(handle, [buffer], offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=1024, help="size of each buffer and of the file")
    parser.add_argument("--only", choices=("cores", "link", "disk"), help="one of the three; default: all")
    options = parser.parse_args()
    nbytes = options.mib << 20
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if options.only in (None, "cores"):
        host_copy(nbytes)
        step_on_host(nbytes // 4)
    if torch.cuda.is_available() and options.only in (None, "link"):
        link(nbytes)
        step_through_gpu(nbytes // 4)
    if options.only in (None, "disk"):
        disk(options.folder, nbytes, 8 << 20)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
