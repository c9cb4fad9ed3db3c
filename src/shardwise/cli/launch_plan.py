"""What `launch` is about to do, worked out before torch is imported: which processes, where, with which environment.

A plan is plain data: `--dry-run` prints it, and the agent starts it. Everything that can be refused is refused here: a
script that is not there, more processes than devices, no device at all.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..config.check import checked
from ..config.drives import drive_notes
from ..config.launchers import LOOPBACK
from ..config.machine import environment_value, interface_towards, physical_gpus, usable_cores, visible_gpus
from ..config.resolve import SEVERAL, Resolution
from ..config.schema import Config, Key
from ..errors import ConfigError, LaunchError
from . import worker
from .as_deepspeed import variables
from .place import is_of_this_machine, placed, task_as_rank


@dataclass(frozen=True)
class Command:
    """What SCRIPT is: a file for Python, or a module, or a program that is run as it is."""

    is_module: bool = False
    without_python: bool = False


_SEVERAL = "because there are several processes"  # as SEVERAL, once the GPUs are counted
_STREAMS = re.compile(r"[0-3]|[0-9]+:[0-3](,[0-9]+:[0-3])*")


@dataclass(frozen=True)
class Watching:
    """How the ranks of this machine are watched.

    tee:        which streams are written to files too: 0 none, 1 stdout, 2 stderr, 3 both, or "0:3,1:1" by rank.
    log_dir:    where; None makes a directory.
    interval_s: how often the agent looks.
    quiet:      no notes, and only the first rank's failure.
    """

    tee: str = "0"
    log_dir: str | None = None
    interval_s: float = 0.1
    quiet: bool = False

    @classmethod
    def typed(cls, tee: str, log_dir: str | None, interval: str, quiet: bool) -> Watching:
        """Of the text of the flags. Raises ConfigError."""
        if not _STREAMS.fullmatch(tee):
            raise ConfigError(
                f"--tee: {tee!r} is not 0, 1 (stdout), 2 (stderr), 3 (both), or these by rank such as 0:3,1:1"
            )
        if log_dir is not None and tee == "0":
            raise ConfigError("--log_dir: has no effect without --tee, which says what is written there")
        try:
            seconds = float(interval)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"--monitor_interval: {interval!r} is not a number of seconds above 0")
        return cls(tee, log_dir, seconds, quiet)


@dataclass(frozen=True)
class LaunchPlan:
    """One machine's part of a run.

    config:          resolved; `num_processes` is filled in.
    origins:         where each setting comes from, by key.
    local_processes: processes of this machine.
    address, port:   where rank 0's machine is found.
    how:             what the script is. watching: how the processes are looked after.
    as_deepspeed:    in the processes, `import deepspeed` finds shardwise.
    beside:          the YAML file that the settings come from, or None.
    environment:     variables that are added to each process's environment.
    as_rank:         no ranks are started: this process becomes one, as a scheduler has started it.
    check_devices:   the number of GPUs could not be found without torch; ask it before anything is started.
    """

    config: Config
    origins: dict[Key, str]
    notes: list[str]
    script: str
    how: Command
    arguments: list[str]
    local_processes: int
    address: str
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    check_devices: bool = False
    as_deepspeed: bool = False
    beside: str | None = None
    watching: Watching = Watching()
    as_rank: bool = False

    @property
    def max_restarts(self) -> int:
        return self.config.engine.max_restarts

    @property
    def command(self) -> list[str]:
        """What each process does, as a user would type it."""
        python = [] if self.how.without_python else [sys.executable, *(["-m"] if self.how.is_module else [])]
        return [*python, self.script, *self.arguments]


def check_script(script: str, how: Command) -> None:
    """LaunchError unless the script (with -m: the module; with --no_python: the program) can be found."""
    if how.without_python:
        if how.is_module:
            raise LaunchError("--no_python and --module contradict each other: a module is run by Python")
        if shutil.which(script) is None:
            raise LaunchError(f"{script}: there is no such program, or it may not be executed")
        return
    if how.is_module:
        top = script.split(".", 1)[0]
        path = list(sys.path)
        sys.path.insert(0, os.getcwd())
        try:
            # Only the top package: finding a submodule would import its parents.
            found = top.isidentifier() and importlib.util.find_spec(top) is not None
        except (ImportError, ValueError):
            found = False
        finally:
            sys.path[:] = path
        if not found:
            raise LaunchError(f"{script}: there is no such module, neither installed nor in the working directory")
        return
    path_ = Path(script)
    if path_.is_dir():
        raise LaunchError(f"{script}: is a directory, not a script")
    if not path_.is_file():
        near = _commands(script)
        if not near and path_.parent.is_dir():
            names = [entry.name for entry in path_.parent.glob("*.py")]
            near = [str(path_.with_name(name)) for name in difflib.get_close_matches(path_.name, names, n=1)]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise LaunchError(f"{script}: there is no such script{hint}")
    if not os.access(path_, os.R_OK):
        raise LaunchError(f"{script}: cannot be read")


def _commands(name: str) -> list[str]:
    """The script behind a package's command, such as axolotl's, which Python runs too; no launcher searches PATH for it."""
    found = shutil.which(name)
    if found is None or not os.access(found, os.R_OK):
        return []
    with open(found, "rb") as file:
        beginning = file.readline(4096) + file.readline(4096)  # a long path to Python stands in the second line
    return [found] if beginning.startswith(b"#!") and b"python" in beginning else []


def check_devices(config: Config, origins: Mapping[Key, str], devices: int | None) -> None:
    """LaunchError unless this machine has a GPU for each of its processes. devices: None if that is not known yet."""
    if config.use_cpu or devices is None:
        return
    if devices == 0:
        raise LaunchError("no CUDA device was found on this machine; add --use_cpu to train on the CPU")
    local = (config.num_processes or 1) // config.num_machines
    if local > devices:
        origin = origins.get(("num_processes",), "default")
        name = "" if origin == "--num_processes" else "num_processes: "
        on_this = " on this machine" if config.num_machines > 1 else ""
        raise LaunchError(
            f"{origin}: {name}{local} processes{on_this} need as many GPUs, but there "
            f"{'is 1' if devices == 1 else f'are {devices}'}; ask for {devices}, or add --use_cpu"
        )


def _check_restarts(config: Config, origins: Mapping[Key, str]) -> None:
    fewer = config.engine.restart_processes
    if fewer is None:
        return
    where = f"{origins.get(('shardwise_config', 'restart_processes'), 'default')}: restart_processes"
    if config.num_machines > 1:
        raise LaunchError(f"{where}: only a run on one machine can change its number of processes")
    if fewer > (config.num_processes or 1):
        raise LaunchError(f"{where}: {fewer} is more than the {config.num_processes or 1} that the run starts with")
    if config.engine.max_restarts == 0:
        raise LaunchError(f"{where}: has no effect without max_restarts")


def _check_gpu_ids(config: Config, origins: Mapping[Key, str]) -> None:
    present = physical_gpus()
    if config.use_cpu or config.gpu_ids in (None, "all") or not present:
        return
    beyond = [part for part in str(config.gpu_ids).split(",") if int(part) >= present]
    if beyond:
        raise LaunchError(
            f"{origins.get(('gpu_ids',), 'default')}: gpu_ids: there is no GPU {', '.join(beyond)}; this machine has "
            f"{present}, numbered from 0"
        )


def fill_processes(resolution: Resolution, devices: int | None) -> Resolution:
    """The resolution with `num_processes` set, and a plain default run turned into one of all GPUs.

    devices: GPUs that are visible here; None if that is not known yet (then one process is taken for now).
    """
    config, origins = resolution.config, dict(resolution.origins)
    if config.num_processes is not None:
        return resolution
    changes: dict[str, object] = {}
    if config.distributed_type == "NO" and ("distributed_type",) in origins:
        local, why = 1, "because distributed_type is NO"
    elif config.use_cpu:
        local, why = 1, "default on the CPU"
    else:
        local, why = devices or 1, "one for each GPU"
    changes["num_processes"] = local * config.num_machines
    origins[("num_processes",)] = why
    if config.distributed_type == "NO" and local * config.num_machines > 1:
        changes["distributed_type"] = "MULTI_CPU" if config.use_cpu else "MULTI_GPU"
        origins[("distributed_type",)] = _SEVERAL
    # Checked again: what was unknown before, such as the batch sizes of a DeepSpeed file, can now be compared.
    return replace(resolution, config=checked({**config.to_values(), **changes}), origins=origins)


def _whole_copies(origins: Mapping[Key, str]) -> list[str]:
    """A note where neither flag nor file says what kind of run it is: who comes here wants his model sharded."""
    if origins.get(("distributed_type",)) not in (SEVERAL, _SEVERAL):
        return []
    return [
        "neither flags nor a file ask for ZeRO: each process holds the whole model, unless the script says otherwise. "
        "--zero_stage 3 shards it."
    ]


def make_plan(
    resolution: Resolution,
    *,
    script: str,
    how: Command = Command(),
    arguments: list[str] | None = None,
    devices: int | None = None,
    devices_known: bool = True,
    as_deepspeed: bool = False,
    beside: str | None = None,
    watching: Watching = Watching(),
) -> LaunchPlan:
    """The plan of this machine. Raises LaunchError or ConfigError.

    devices: visible GPUs, for tests; the machine is asked if None and `devices_known`.
    """
    check_script(script, how)
    if how.without_python and as_deepspeed:
        raise LaunchError("--as_deepspeed: has no effect on a program that --no_python runs without Python")
    as_rank = task_as_rank() is not None
    if devices is None and devices_known and not as_rank and not resolution.config.use_cpu:
        devices = visible_gpus(resolution.config.gpu_ids)
    resolution = fill_processes(placed(resolution), devices)
    config, origins, notes = resolution.config, dict(resolution.origins), list(resolution.notes)
    _check_gpu_ids(config, origins)
    check_devices(config, origins, devices)
    local = (config.num_processes or 1) // config.num_machines
    _check_restarts(config, origins)
    address = config.main_process_ip or LOOPBACK
    port = config.main_process_port or 0
    if config.num_machines == 1 and port and not port_is_free(address, port):
        notes.append(f"main_process_port: {port} is in use; a free port is taken instead.")
        port = 0
    elif config.num_machines > 1 and config.machine_rank == 0 and not as_rank and not port_is_free("", port):
        origin = origins.get(("main_process_port",), "default")
        raise LaunchError(
            f"{origin}: main_process_port: {port} is in use on this machine; take another one on all machines"
        )
    if config.num_machines > 1 and config.machine_rank == 0 and not is_of_this_machine(address):
        notes.append(
            f"machine_rank is 0, but main_process_ip {address} is no address of this machine. If another one is machine 0, "
            "give this one its own --machine_rank: two machines of one rank wait for each other."
        )
    return LaunchPlan(
        config=config,
        origins=origins,
        notes=[*notes, *drive_notes(config), *([] if as_deepspeed else _whole_copies(origins))],
        script=script,
        how=how,
        arguments=list(arguments or []),
        local_processes=local,
        address=address,
        port=port,
        environment=rank_environment(config, local) | (variables(config, beside) if as_deepspeed else {}),
        check_devices=not config.use_cpu and devices is None and not as_rank,
        as_rank=as_rank,
        as_deepspeed=as_deepspeed,
        beside=beside,
        watching=watching,
    )


def rank_environment(config: Config, local_processes: int) -> dict[str, str]:
    """What every process gets besides its rank: the configuration, threads, devices."""
    variables = config.to_environment()
    said, given = config.engine.threads_per_rank, environment_value("OMP_NUM_THREADS")
    if said is not None:
        variables["OMP_NUM_THREADS"] = str(said)
    elif not given:
        # More threads than cores make libgomp's waiting threads fight each other: 10 to 40 times slower.
        variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // local_processes))
    if environment_value("OMP_WAIT_POLICY") is None:
        # An idle libgomp thread then sleeps instead of spinning on a core that another process could use.
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
    if not config.use_cpu and config.gpu_ids not in (None, "all"):
        variables["CUDA_VISIBLE_DEVICES"] = str(config.gpu_ids).replace(" ", "")
    if config.num_machines > 1 and not environment_value("GLOO_SOCKET_IFNAME"):
        # gloo would ask for the address of this machine's own name, which many hosts files give as 127.0.1.1, or not at all.
        interface = interface_towards(str(config.main_process_ip))
        if interface is not None:
            variables["GLOO_SOCKET_IFNAME"] = interface
    if config.enable_cpu_affinity:
        variables[worker.BIND] = "1"
    if environment_value("PYTHONFAULTHANDLER") is None:
        # A crash in C++ then shows the Python line that led to it.
        variables["PYTHONFAULTHANDLER"] = "1"
    return variables


def port_is_free(address: str, port: int) -> bool:
    """Can this machine listen there? An address of another machine counts as free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def free_port(address: str = LOOPBACK) -> int:
    """A port that nothing listens on at this moment."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(f"main_process_ip: {address}: cannot be used on this machine: {error.strerror}") from None
        return int(probe.getsockname()[1])
