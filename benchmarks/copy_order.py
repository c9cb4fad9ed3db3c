"""When does a computation go on that waits for the first of two copies to the host, while the second one is under way?

    python benchmarks/copy_order.py             2.4 GB of weights, then 4.7 GB of states, as a save of `full1b` on a rank
    python benchmarks/copy_order.py --gb 0.4 0.8 --rounds 3

Every way copies the same bytes from one GPU into pinned memory, weights first, and the compute stream waits for the weights'
event before it runs products of about 20 ms. `alone` runs nothing else; `and number` copies one number to the host in their
middle, as a step's verdict does. Milliseconds from the moment when the copies are enqueued, by events, medians of rounds:
when the weights were there, the states, and when the products had ended.

    behind     the states on the weights' stream
    beside     the states on a stream of their own, which waits for the weights
    later      the states enqueued once the host has seen the weights
    in pieces  as later, 64 MiB at a time, two of them under way at most
"""

from __future__ import annotations

import argparse
import statistics
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwise.offload.pinned import host_tensor, shared_memory
from shardwise.ranks.lanes import timed_mark

PIECE = 64 << 20
UNIT = 256 << 20  # bytes of one tensor, about a block's masters on a rank
MEMORY: dict[str, Callable[[int], Tensor]] = {
    "torch's": lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True),
    "registered": lambda nbytes: host_tensor(nbytes, torch.uint8, pinned=True),
    "shared": lambda nbytes: shared_memory(nbytes, pinned=True, copies=()).tensor,
}


class Copies:
    """Device memory with its place on the host, in tensors as a plan has them."""

    def __init__(self, nbytes: int, into: Tensor) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.into = list(torch.split(into, UNIT))
        self.sources = [torch.ones(len(one), dtype=torch.uint8, device=device) for one in self.into]
        assert sum(map(len, self.sources)) == nbytes

    def enqueue(self, stream: torch.Stream) -> torch.Event:
        with stream:
            torch._foreach_copy_(self.into, self.sources, non_blocking=True)
            return timed_mark(stream)

    def in_pieces(self, stream: torch.Stream) -> torch.Event:
        under_way: deque[torch.Event] = deque()
        with stream:
            for into, source in zip(self.into, self.sources, strict=True):
                for one, other in zip(torch.split(into, PIECE), torch.split(source, PIECE), strict=True):
                    if len(under_way) == 2:
                        under_way.popleft().synchronize()
                    one.copy_(other, non_blocking=True)
                    under_way.append(timed_mark(stream))
            return under_way[-1]


def states_after(way: str, weights: torch.Event, states: Copies, streams: list[torch.Stream]) -> Any:
    """Have the states copied; gives what gives their event, when it is asked."""
    if way == "behind":
        event = states.enqueue(streams[0])
        return lambda: event
    if way == "beside":
        streams[1].wait_event(weights)
        event = states.enqueue(streams[1])
        return lambda: event
    found: list[torch.Event] = []

    def write() -> None:
        weights.synchronize()
        found.append(states.in_pieces(streams[0]) if way == "in pieces" else states.enqueue(streams[0]))

    thread = threading.Thread(target=write)
    thread.start()

    def ended() -> torch.Event:
        thread.join()
        return found[0]

    return ended


def timed(way: str, weights: Copies, states: Copies, *, number: bool) -> tuple[float, float, float]:
    """Milliseconds until the weights were there, the states, and the products had ended."""
    device = weights.sources[0].device
    compute, streams = torch.accelerator.current_stream(), [torch.Stream(device) for _ in range(2)]
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    landing = torch.empty(1, pin_memory=True)
    out = matrix @ matrix
    value = torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    begin = timed_mark(compute)
    streams[0].wait_event(begin)
    there = weights.enqueue(streams[0])
    compute.wait_event(there)
    ended = states_after(way, there, states, streams)
    for product in range(14):
        torch.mm(matrix, matrix, out=out)
        if number and product == 7:
            landing.copy_(value, non_blocking=True)
    done = timed_mark(compute)
    last = ended()
    torch.cuda.synchronize()
    return begin.elapsed_time(there), begin.elapsed_time(last), begin.elapsed_time(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--gb", nargs=2, type=float, default=[2.4, 4.7], metavar=("WEIGHTS", "STATES"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("copy_order: there is no GPU here, and on a CPU no copy runs beside the computation.")
    sizes = [int(gb * 1e9) for gb in args.gb]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.gb} GB")
    print("| memory | states | products | weights ms | states ms | products ms |\n|---|---|---|---|---|---|")
    for memory, make in MEMORY.items():
        weights, states = (Copies(nbytes, make(nbytes)) for nbytes in sizes)
        for way in ("behind", "beside", "later", "in pieces"):
            for number in (False, True):
                timed(way, weights, states, number=number)
                rounds = [timed(way, weights, states, number=number) for _ in range(args.rounds)]
                row = " | ".join(f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True))
                print(f"| {memory} | {way} | {'and number' if number else 'alone'} | {row} |", flush=True)
        del weights, states


if __name__ == "__main__":
    main()
