"""What the launcher told this process through the environment: the only place that reads it.

`shardwise launch` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; what `srun`
and `mpirun` set in their place `launchers.py` knows. A process that nobody launched is a run of one rank. This file must not
import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from . import launchers
from .launchers import REMEDY, Said, found, whole
from .machine import interface_towards
from .placing import Machine, machine_of


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among the ranks, as the launcher set it.

    local_rank, local_world_size: None where the launcher does not say; the ranks then find out from their host names.
    launched:                     False when no launcher set the variables; then rank 0 of 1.
    address, port:                where rank 0 listens; None in a run of one rank that needs none.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    local_world_size: int | None = 1
    launched: bool = False
    address: str | None = None
    port: int | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> RankEnvironment:
        """Raises ConfigError if a variable contradicts another, is no whole number, or is missing."""
        env = os.environ if environ is None else environ
        rank, world_size = whole(env, "RANK"), whole(env, "WORLD_SIZE")
        complete = rank is not None and world_size is not None
        said = None if complete else found(env)
        if rank is not None and world_size is not None:
            said = Said("RANK", rank, world_size)
        elif said is None and rank is None and world_size is None:
            return cls()
        elif said is None:
            missing, other = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
            raise ConfigError(
                f"{missing} is not set in the environment, but {other} is. Start the script with `shardwise launch` or "
                "`torchrun`, or unset RANK and WORLD_SIZE."
            )
        for name, value, theirs in (("RANK", rank, said.rank), ("WORLD_SIZE", world_size, said.world_size)):
            if value not in (None, theirs):
                raise ConfigError(f"{name} is {value} in the environment, but {said.by} says {theirs}. {REMEDY}")
        if not complete and said.world_size == 1:
            return cls()
        return _placed(said, env)

    def export(self) -> None:
        """Say the place in torch's words, for torch and other libraries, where the launcher used its own."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        if not self.launched:
            return
        for name, value in values.items():
            if value is not None:
                os.environ.setdefault(name, str(value))
        # gloo would ask for the address of this machine's own name, which many hosts files give as 127.0.1.1, or not at all.
        several = self.local_world_size is None or self.local_world_size < self.world_size
        interface = interface_towards(self.address) if several and self.address is not None else None
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _placed(said: Said, env: Mapping[str, str]) -> RankEnvironment:
    """The place that a launcher says, completed by torch's variables, which come first."""
    if not 0 <= said.rank < said.world_size:
        raise ConfigError(f"rank {said.rank} ({said.by}) is not between 0 and the {said.world_size} processes - 1.")
    local_rank, local_world_size = whole(env, "LOCAL_RANK"), whole(env, "LOCAL_WORLD_SIZE")
    if local_rank is None:
        local_rank = said.local_rank
    if local_world_size is None:
        local_world_size = said.local_world_size
    if said.world_size == 1:
        local_rank, local_world_size = local_rank or 0, local_world_size or 1
    most = said.world_size if local_world_size is None else local_world_size
    if most > said.world_size or not 0 <= (local_rank or 0) < most:
        raise ConfigError(
            f"LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_world_size} does not fit rank {said.rank} of "
            f"{said.world_size} ({said.by}). {REMEDY}"
        )
    address, port = env.get("MASTER_ADDR") or said.address, whole(env, "MASTER_PORT") or said.port
    return RankEnvironment(said.rank, said.world_size, local_rank, local_world_size, True, address, port)


def without_multicast() -> None:
    """Keep torch's symmetric memory from making multicast objects, which copies do not need, unless somebody asked for them."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def forgotten_tasks() -> int | None:
    """How many tasks this process's Slurm job asked for, where it is none of them; see `launchers.py`."""
    return launchers.forgotten_tasks(os.environ)


def task_of_srun() -> Said | None:
    """This process as a task of srun, or None if it is none: for a launcher, which starts ranks of its own."""
    return launchers.slurm(os.environ)


def machine_of_scheduler() -> Machine | None:
    """Where a scheduler has put this launcher; see `placing.py`."""
    return machine_of(os.environ)


def fork_launched() -> bool:
    """Whether a launcher says that it forked this process, as accelerate's for notebooks does."""
    return os.environ.get("FORK_LAUNCHED", "0").lower() in ("1", "true", "yes")


def torch_debug() -> str:
    """torch's own setting of this name: under DETAIL every collective sends more than without."""
    return os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper()
