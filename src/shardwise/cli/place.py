"""What a launcher takes from the scheduler that started it: which machine this is, of how many, and where machine 0 is found.

A flag, and a file that speaks of several machines, come before what the scheduler says. A launcher that `srun` started once for
each GPU is no launcher of ranks: it becomes one.
"""

from __future__ import annotations

import socket
from dataclasses import replace

from ..config.check import checked
from ..config.environment import machine_of_scheduler, task_of_srun
from ..config.launchers import Said
from ..config.resolve import Resolution
from ..errors import LaunchError


def placed(resolution: Resolution) -> Resolution:
    """The resolution of this machine of a scheduler's run. Raises ConfigError or LaunchError."""
    task = task_as_rank()
    if task is not None:
        return _as_rank(resolution, task)
    machine = machine_of_scheduler()
    config, origins, notes = resolution.config, dict(resolution.origins), list(resolution.notes)
    if machine is None or (config.num_machines > 1 and config.num_machines != machine.machines):
        return resolution
    if origins.get(("num_machines",)) == "--num_machines" and config.num_machines == 1:
        if machine.rank == 0:
            notes.append(
                f"{machine.by} starts {machine.machines} launchers, and --num_machines is 1: each makes a run of its own."
            )
        return replace(resolution, notes=notes)
    said: dict[str, object] = {"machine_rank": machine.rank, "main_process_ip": machine.address}
    if config.num_machines == 1:
        said |= {"num_machines": machine.machines, "main_process_port": machine.port}
        if config.num_processes is None and machine.processes is not None:
            said["num_processes"] = machine.machines * machine.processes
    values = config.to_values()
    flags = {key[0] for key, origin in origins.items() if origin == f"--{key[0]}"}
    several = config.num_machines > 1  # whoever wrote this knows of machine 0, but perhaps not which one this is
    for name, value in said.items():
        known = several and (name,) in origins
        if value is not None and name not in flags and not known:
            values[name] = value
            origins[(name,)] = f"as {machine.by} says"
    if values.get("main_process_ip") is None:
        raise LaunchError(
            f"{machine.by} starts {machine.machines} launchers, but does not say where: give --main_process_ip."
        )
    return replace(resolution, config=checked(values), origins=origins)


def task_as_rank() -> Said | None:
    """This launcher's task, where `srun` has started several on each machine: each of them is a rank. None for another one."""
    task = task_of_srun()
    return task if task is not None and task.world_size > 1 and (task.local_world_size or 1) != 1 else None


def _as_rank(resolution: Resolution, task: Said) -> Resolution:
    config, origins = resolution.config, dict(resolution.origins)
    each = task.local_world_size or 1
    if config.engine.max_restarts:
        raise LaunchError(
            f"{origins.get(('shardwise_config', 'max_restarts'), 'default')}: max_restarts: has no effect where srun starts a "
            "launcher for each rank; give srun --ntasks-per-node 1"
        )
    if config.num_processes not in (None, task.world_size):
        raise LaunchError(
            f"num_processes is {config.num_processes}, but srun has {task.world_size} tasks; leave it out"
        )
    said: dict[str, object] = {"num_processes": task.world_size}
    if task.world_size % each == 0 and task.world_size > each and config.num_machines == 1:
        said |= {"num_machines": task.world_size // each, "machine_rank": task.rank // each}
        said |= {"main_process_ip": config.main_process_ip or task.address, "main_process_port": task.port}
    if config.distributed_type == "NO":
        said["distributed_type"] = "MULTI_CPU" if config.use_cpu else "MULTI_GPU"
    origins |= {(name,): "as srun says" for name in said}
    return replace(resolution, config=checked({**config.to_values(), **said}), origins=origins)


def is_of_this_machine(address: str) -> bool:
    """Can this machine listen at that address or name?"""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
