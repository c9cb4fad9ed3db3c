"""Where a process stands among the ranks, in the variables of whoever started it.

Each launcher has words of its own for the same four numbers; a row of `MPI` or a function here reads one launcher's. What a
launcher does not say is None, and `RankEnvironment.read` decides what that means. Pure functions over a mapping.

    torchrun, shardwise launch   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    mpirun, mpiexec              one row of MPI
    srun                         SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, ... of the step, never of the job alone:
                                 a login shell and a batch script have the job's, and are one process
    SageMaker                    SM_HOSTS, SM_CURRENT_HOST: one process on each machine
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError

LOOPBACK = "127.0.0.1"
REMEDY = (
    "Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process, or start them with "
    "`shardwise launch` or `torchrun`."
)


@dataclass(frozen=True)
class Said:
    """What one launcher's variables say of this process; None where they do not say.

    by:            the launcher, in words for an error.
    address, port: where rank 0 listens.
    """

    by: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_world_size: int | None = None
    address: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class MpiNames:
    """The variables of one family of MPI launchers; of several names the first that is set counts."""

    by: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


MPI = (
    MpiNames(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    MpiNames(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    MpiNames(
        "MPICH, Intel MPI or Cray PALS",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
    # PALS itself does not say how many processes there are; a user may.
    MpiNames("Cray PALS", "PALS_RANKID", "WORLD_SIZE", ("PALS_LOCAL_RANKID",), ("PALS_LOCAL_SIZE",)),
)
# What all processes of one mpirun have in common and another one's have not.
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PALS_APID", "PBS_JOBID", "LSB_JOBID", "SLURM_JOB_ID")
TORCH_PORT = 29500

# Slurm numbers the steps that are no `srun` from here on: the batch script, `salloc`'s shell, what ssh brings in.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def whole(env: Mapping[str, str], name: str) -> int | None:
    """The variable as a number, None where it is not set. Raises ConfigError for anything else."""
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number.") from None


def first_host(nodes: str) -> str:
    """The first machine of Slurm's short form: `gpu[003-007,12],login1` gives gpu003."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group() if head else nodes)


def tasks_on(node: int, counts: str) -> int | None:
    """Tasks of a machine in Slurm's short form: `2(x3),1` gives 2 for machines 0 to 2, and 1 for machine 3."""
    for part in counts.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            return None
        times = int(match[2] or 1)
        if node < times:
            return int(match[1])
        node -= times
    return None


def port_of(*names: str) -> int:
    """A port that all processes of one job come to by themselves, between 15000 and 29999: below the range from which Linux
    takes the ports of outgoing connections, above what most services listen on."""
    return 15000 + zlib.crc32("/".join(names).encode()) % 15000


def step_tasks(env: Mapping[str, str]) -> int | None:
    """How many tasks the `srun` has that started this process; None if none did."""
    step = whole(env, "SLURM_STEP_ID") if "SLURM_STEP_ID" in env else whole(env, "SLURM_STEPID")
    special = step is not None and step >= _FIRST_SPECIAL_STEP
    if "SLURM_PROCID" not in env or special or "SLURM_PTY_PORT" in env:  # srun --pty talks to its first task alone
        return None
    return whole(env, "SLURM_STEP_NUM_TASKS")


def forgotten_tasks(env: Mapping[str, str]) -> int | None:
    """How many tasks a Slurm job asked for that this process, which no `srun` started, runs without; None for none."""
    tasks = whole(env, "SLURM_NTASKS")
    return tasks if tasks is not None and tasks > 1 and step_tasks(env) is None else None


def slurm(env: Mapping[str, str]) -> Said | None:
    """A task of `srun`; None for any other process, also inside an allocation."""
    rank, world_size = whole(env, "SLURM_PROCID"), step_tasks(env)
    if rank is None or world_size is None:
        return None
    node = whole(env, "SLURM_NODEID")
    counts = env.get("SLURM_STEP_TASKS_PER_NODE")
    alone = (whole(env, "SLURM_STEP_NUM_NODES") or whole(env, "SLURM_NNODES")) == 1
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    return Said(
        "srun",
        rank,
        world_size,
        whole(env, "SLURM_LOCALID"),
        world_size if alone else None if counts is None or node is None else tasks_on(node, counts),
        LOOPBACK if alone else first_host(nodes) if nodes else None,
        port_of(env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID") or env.get("SLURM_STEPID") or ""),
    )


def mpi(env: Mapping[str, str]) -> Said | None:
    """A process of `mpirun` or `mpiexec`. Raises ConfigError if it says its rank and not how many there are."""
    for names in MPI:
        rank, world_size = whole(env, names.rank), whole(env, names.world_size)
        if rank is None:
            continue
        if world_size is None:
            raise ConfigError(f"{names.rank} is set, as by {names.by}, but not {names.world_size}. {REMEDY}")
        local_rank, local_world_size = _first(env, names.local_rank), _first(env, names.local_world_size)
        nodes = env.get("SLURM_JOB_NODELIST")
        address = LOOPBACK if local_world_size == world_size else first_host(nodes) if nodes else None
        job = next((env[name] for name in _MPI_JOBS if env.get(name)), None)
        port = TORCH_PORT if job is None else port_of(job)
        return Said(names.by, rank, world_size, local_rank, local_world_size, address, port)
    return None


def sagemaker(env: Mapping[str, str]) -> Said | None:
    """The one process that SageMaker starts on each machine of several, where no launcher runs in its place.

    Raises ConfigError for a list of hosts that is none, or does not have this one.
    """
    text, own = env.get("SM_HOSTS"), env.get("SM_CURRENT_HOST")
    if text is None or own is None:
        return None
    try:
        hosts = [str(name) for name in json.loads(text)]
        rank = hosts.index(own)
    except (ValueError, TypeError):
        raise ConfigError(f"SM_HOSTS is {text!r}, which is no list with SM_CURRENT_HOST {own!r} in it.") from None
    return Said("SageMaker", rank, len(hosts), 0, 1, hosts[0], port_of(*hosts)) if len(hosts) > 1 else None


def found(env: Mapping[str, str]) -> Said | None:
    """What the launcher says that is not torch's; None for a process that none started.

    `mpirun` inside an allocation starts its own helpers through `srun`, whose variables the processes inherit: Slurm's count
    only where no MPI's are there or both say the same, which is `srun --mpi`.
    """
    by_mpi, by_slurm = mpi(env), slurm(env)
    if by_mpi is None or by_slurm is None:
        return by_mpi or by_slurm or sagemaker(env)
    same = (by_mpi.rank, by_mpi.world_size) == (by_slurm.rank, by_slurm.world_size)
    return by_slurm if same else by_mpi


def _first(env: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next((whole(env, name) for name in names if name in env), None)
