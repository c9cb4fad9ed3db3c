"""Run a program of several ranks on one GPU, with NCCL: it takes the ranks for hosts of their own, which one GPU each has.

    torchrun --nproc_per_node 2 tests/rig/one_gpu.py tests/gpu/worker.py --only offload

Collectives then go over sockets and the ranks' kernels take turns, so a time says nothing; orders, bits and races are real.
Copy engines read the other rank's memory by the handle that two GPUs would use.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist


def command(script: Path, ranks: int = 2) -> list[str]:
    """Starts `script` in so many ranks, each on a GPU of its own where there are as many."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, *([] if torch.cuda.device_count() >= ranks else [__file__]), str(script)]


def main(argv: Sequence[str]) -> None:
    if not argv or "RANK" not in os.environ:
        raise SystemExit("one_gpu: name a script, below torchrun.")
    os.environ["NCCL_HOSTID"] = f"rank {os.environ['RANK']}"
    script, *arguments = argv
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    _share()
    runpy.run_path(script, run_name="__main__")


def _share() -> None:
    """Let shardwise, which refuses a shared GPU, take it for one of each rank, and for GPUs that see each other."""
    from shardwise.offload import peers
    from shardwise.ranks import joining, meeting

    seen = [f"the GPU of rank {os.environ['RANK']}"]
    meeting.visible_gpus = joining.visible_gpus = lambda: seen  # type: ignore[assignment, attr-defined]
    peers._why_not = lambda ranks: None if ranks.device.type == "cuda" else "the ranks run on CPUs"
    dist.get_node_local_rank = lambda *_, **__: 0


if __name__ == "__main__":
    main(sys.argv[1:])
