"""What does keeping the optimizer and the weights on the host cost in time, and what does it save on the device?

    torchrun --nproc_per_node 2 benchmarks/offload.py --case full1b
    torchrun --nproc_per_node 2 benchmarks/offload.py --case bart --tiny --use-cpu

The measurement of compare.py, with engines that differ in what rests on the CPU, beside FSDP2's CPUOffloadPolicy. The
column `ratio` is to the first engine, which offloads the least. The JSON lines carry the bytes at rest by role and
tier, and the resident host memory of a rank.
"""

from __future__ import annotations

import sys

from compare import run

DEFAULT_ENGINES = {
    "bart": "shardwise:3,shardwise:3+opt,shardwise:3+opt+param,fsdp2+cpu",
    "lora8b": "shardwise:3,shardwise:3+opt,shardwise:3+opt+param,fsdp2+cpu",
    "full1b": "shardwise:2,shardwise:2+opt,shardwise:3+opt+param,fsdp2+cpu",
    "full8b": "shardwise:3+opt,shardwise:3+opt+param,fsdp2+cpu",
}

if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:], (__doc__ or "").split("\n\n", maxsplit=1)[0], DEFAULT_ENGINES))
