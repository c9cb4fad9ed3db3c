"""Where a benchmark runs: this rank, its device, and the facts about machine and versions that go into every record."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from shardwise.ranks.ranks import Ranks


@dataclass
class Place:
    """This rank among the ranks of the run, with a process group in place even when there is one rank.

    device: cuda:local_rank (NCCL), or cpu (gloo).
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, *, use_cpu: bool = False, host_collectives: bool = False) -> Place:
        """Join the run that torchrun or `shardwise launch` started; alone, be a run of one rank.

        host_collectives: beside NCCL have gloo in the same group, for what lies on the host.
        """
        rank = int(os.environ.get("RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available() and not use_cpu
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        where: dict[str, Any] = {"rank": rank, "world_size": world_size}
        if "MASTER_PORT" not in os.environ:
            where["init_method"] = f"tcp://127.0.0.1:{_free_port()}"
        if cuda:
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if host_collectives else "nccl", device_id=device, **where)
            # torchrun gives each rank one thread, which would starve whatever steps on the CPU.
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
        else:
            dist.init_process_group("gloo", **where)
            torch.set_num_threads(1)
        return cls(rank, world_size, device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def ranks(self) -> Ranks:
        """shardwise's view of the same ranks, made once: it adds a gloo group beside NCCL."""
        from shardwise.ranks.ranks import Ranks  # here, so that a run of another library's engine does not import it

        return Ranks.join(use_cpu=not self.cuda)

    def synchronize(self) -> None:
        """Wait until this rank's device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def leave(self) -> None:
        dist.destroy_process_group()

    def facts(self) -> dict[str, Any]:
        """Commit, machine and versions, for a record."""
        import peft
        import transformers

        name = torch.cuda.get_device_name(self.device) if self.cuda else platform.processor() or platform.machine()
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if self.cuda else None
        return {
            "commit": commit(),
            "device": name,
            "world_size": self.world_size,
            "cpu_cores": os.cpu_count(),
            "threads_per_rank": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": nccl,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        }


def commit() -> str:
    """The short hash of the checked-out commit, or "unknown" where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
