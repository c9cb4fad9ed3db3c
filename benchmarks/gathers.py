"""What does a gather by copy engines cost beside one by NCCL, alone and while matrix products run?

    torchrun --nproc_per_node 2 benchmarks/gathers.py                 218 MiB a rank: a block of an 8B Llama
    torchrun --nproc_per_node 2 benchmarks/gathers.py --mib 32

Needs ranks of one machine whose GPUs reach each other's memory, and says so where there are none. Prints a JSON line and a
table. The products beside are 4096 x 4096 x 14336 in bf16, without pause; so are the gathers: a training step pauses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch

from place import Place
from shardwise.offload.peers import PeerMemory
from shardwise.ranks.lanes import Lanes

PRODUCTS = 400


def main(argv: Sequence[str]) -> int:
    """Measure; gives the exit code, 2 where copy engines cannot gather."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--mib", type=int, default=218, help="of one rank's shard")
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args(argv)
    place = Place.join(use_cpu=options.use_cpu)
    try:
        lanes = Lanes(place.device)
        peers = PeerMemory.open(place.ranks, lanes, "auto")
        if peers is None:
            place.say("copy engines cannot gather here: they need CUDA and ranks of one machine that reach each other")
            return 2
        figures = measure(place, lanes, options.mib << 20)
        place.say(json.dumps({"mib": options.mib, **figures, **place.facts()}))
        place.say(
            "\n".join(f"{name:<42}{value:>9.3f} ms" for name, value in figures.items() if isinstance(value, float))
        )
        return 0
    finally:
        place.leave()


def measure(place: Place, lanes: Lanes, nbytes: int) -> dict[str, float]:
    """Milliseconds by what was done."""
    ranks = place.ranks
    shared = ranks.shards.map_shared(nbytes, torch.uint8)
    whole = torch.zeros(ranks.world_size * nbytes, dtype=torch.uint8, device=place.device)
    turn = [(ranks.rank + step) % ranks.world_size for step in range(ranks.world_size)]
    pairs = [(whole[r * nbytes : (r + 1) * nbytes], shared[r]) for r in turn]
    left = torch.randn(4096, 4096, device=place.device, dtype=torch.bfloat16)
    right = torch.randn(4096, 14336, device=place.device, dtype=torch.bfloat16)

    def copies() -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)

    def by_nccl() -> None:
        ranks.shards.all_gather(whole, shared[ranks.shards.rank])

    def product() -> None:
        torch.mm(left, right)

    def each(call: Callable[[], None], times: int) -> float:
        call()
        place.synchronize()
        ranks.barrier()
        started = time.perf_counter()
        for _ in range(times):
            call()
        place.synchronize()
        return (time.perf_counter() - started) / times * 1000

    def products_beside(call: Callable[[], None], times: int) -> float:
        place.synchronize()
        ranks.barrier()
        started = time.perf_counter()
        with lanes.gather.on():
            for _ in range(times):
                call()
        for _ in range(PRODUCTS):
            product()
        done = lanes.mark_compute()
        assert done is not None
        done.synchronize()
        taken = (time.perf_counter() - started) / PRODUCTS * 1000
        place.synchronize()
        return taken

    figures = {
        "gather by copy engines": each(copies, 10),
        "gather by NCCL": each(by_nccl, 10),
        "fence": each(ranks.shards.fence, 50),
        "product, alone": each(product, PRODUCTS),
    }
    # As many gathers as last about as long as the products.
    for name, call in (("copy engines", copies), ("NCCL", by_nccl)):
        lasting = int(PRODUCTS * figures["product, alone"] / figures[f"gather by {name}"])
        figures[f"product, beside gathers by {name}"] = products_beside(call, lasting)
    return figures


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
