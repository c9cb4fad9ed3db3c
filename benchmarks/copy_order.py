"""When does a computation go on that waits for the first of two copies to the host, while the second one is under way?

    python benchmarks/copy_order.py             2.4 GB of weights, then 4.7 GB of states, as a save of `full1b` on a rank
    python benchmarks/copy_order.py --gb 0.4 0.8 --rounds 3

Every way copies the same bytes from one GPU into pinned memory, weights first, and the compute stream waits for the weights'
event before it runs products of about 20 ms. `alone` runs nothing else; `number copied` copies one number to the host in their
middle, as a step's verdict does; `number written` has a kernel write it there. Milliseconds from the moment when the copies are
enqueued, by events, medians of rounds: when the weights were there, the states, and when the products had ended.

    behind     the states on the weights' stream
    beside     the states on a stream of their own, which waits for the weights
    later      the states enqueued once the host has seen the weights
    in pieces  as later, 64 MiB at a time, two of them under way at most
    one by one as in pieces, and the next one is enqueued when the one before is there
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
WAYS = ("behind", "beside", "later", "in pieces", "one by one")
PRODUCTS = ("alone", "number copied", "number written")
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

    def in_pieces(self, stream: torch.Stream, at_once: int) -> torch.Event:
        under_way: deque[torch.Event] = deque()
        with stream:
            for into, source in zip(self.into, self.sources, strict=True):
                for one, other in zip(torch.split(into, PIECE), torch.split(source, PIECE), strict=True):
                    if len(under_way) == at_once:
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
        at_once = {"in pieces": 2, "one by one": 1}.get(way)
        found.append(states.enqueue(streams[0]) if at_once is None else states.in_pieces(streams[0], at_once))

    thread = threading.Thread(target=write)
    thread.start()

    def ended() -> torch.Event:
        thread.join()
        return found[0]

    return ended


class Seen:
    """Pinned host memory, (1,) float32, as the device sees it."""

    def __init__(self, host: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (1,),
            "typestr": "<f4",
            "data": (host.data_ptr(), False),
            "version": 2,
        }


def timed(way: str, weights: Copies, states: Copies, products: str) -> tuple[float, float, float]:
    """Milliseconds until the weights were there, the states, and the products had ended."""
    device = weights.sources[0].device
    compute, streams = torch.accelerator.current_stream(), [torch.Stream(device) for _ in range(2)]
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    landing = torch.zeros(1, pin_memory=True)
    seen = torch.as_tensor(Seen(landing), device="cuda")
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
        if product == 7 and products == "number copied":
            landing.copy_(value, non_blocking=True)
        elif product == 7 and products == "number written":
            torch.add(value, 0, out=seen)
    done = timed_mark(compute)
    last = ended()
    torch.cuda.synchronize()
    assert products == "alone" or landing.item() == 1
    return begin.elapsed_time(there), begin.elapsed_time(last), begin.elapsed_time(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--gb", nargs=2, type=float, default=[2.4, 4.7], metavar=("WEIGHTS", "STATES"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs="+", choices=sorted(MEMORY), default=list(MEMORY))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("copy_order: there is no GPU here, and on a CPU no copy runs beside the computation.")
    sizes = [int(gb * 1e9) for gb in args.gb]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.gb} GB")
    print("| memory | states | products | weights ms | states ms | products ms |\n|---|---|---|---|---|---|")
    for memory in args.memory:
        make = MEMORY[memory]
        weights, states = (Copies(nbytes, make(nbytes)) for nbytes in sizes)
        for way in WAYS:
            for products in PRODUCTS:
                timed(way, weights, states, products)
                rounds = [timed(way, weights, states, products) for _ in range(args.rounds)]
                row = " | ".join(f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True))
                print(f"| {memory} | {way} | {products} | {row} |", flush=True)
        del weights, states


if __name__ == "__main__":
    main()
