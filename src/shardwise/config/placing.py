"""Which machine of a run a launcher is on, in the variables of whoever started it there.

`launchers.py` reads where a process stands among the ranks; this file reads where a launcher stands among the machines, one row
or function for each scheduler. Pure functions over a mapping.

    srun, one task per machine     SLURM_PROCID of SLURM_STEP_NUM_TASKS; machine 0 is the first of the step's nodes
    Kubernetes' PyTorchJob         PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT (or MASTER_ADDR, MASTER_PORT)
    SageMaker                      SM_CURRENT_HOST in SM_HOSTS
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from .launchers import TORCH_PORT, Said, sagemaker, slurm, whole


@dataclass(frozen=True)
class Machine:
    """Where this machine stands. by: who says so. processes: on each machine, or None where nobody says."""

    by: str
    rank: int
    machines: int
    address: str | None
    port: int
    processes: int | None = None


def machine_of(env: Mapping[str, str]) -> Machine | None:
    """This launcher's place; None where no scheduler started it, or on one machine alone. Raises ConfigError."""
    return of_pytorch_job(env) or of_sagemaker(env) or of_slurm(env)


def of_slurm(env: Mapping[str, str]) -> Machine | None:
    """A task of `srun` that is alone on its machine."""
    task = slurm(env)
    if task is None or task.world_size == 1 or (task.local_world_size or 1) != 1:
        return None
    return _of_task(task)


def _of_task(task: Said) -> Machine:
    """Of a process that is alone on its machine."""
    return Machine(task.by, task.rank, task.world_size, task.address, task.port or TORCH_PORT)


def of_pytorch_job(env: Mapping[str, str]) -> Machine | None:
    """A pod of Kubernetes' training operator, which says what torchrun is to be told."""
    nodes = env.get("PET_NNODES", "")
    if not nodes or nodes == "1":
        return None
    if not nodes.isdigit():
        raise ConfigError(
            f"PET_NNODES is {nodes!r}: an elastic PyTorchJob. `shardwise launch` needs a fixed number of machines; leave out "
            "elasticPolicy."
        )
    rank = whole(env, "PET_NODE_RANK")
    rank = whole(env, "RANK") if rank is None else rank
    if rank is None:
        raise ConfigError("PET_NNODES is set, as by a PyTorchJob, but neither PET_NODE_RANK nor RANK is.")
    address = env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR")
    port = whole(env, "PET_MASTER_PORT") or whole(env, "MASTER_PORT") or TORCH_PORT
    each = env.get("PET_NPROC_PER_NODE", "")
    return Machine("the PyTorchJob", rank, int(nodes), address, port, int(each) if each.isdigit() else None)


def of_sagemaker(env: Mapping[str, str]) -> Machine | None:
    """A container of a SageMaker training job, which starts one process on each machine."""
    task = sagemaker(env)
    return None if task is None else _of_task(task)
