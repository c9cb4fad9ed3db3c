"""`shardwise launch` for other machines than this one: by ssh on the hosts of a file, or as a batch script for Slurm."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..config.launchers import TORCH_PORT
from ..config.machine import environment_value
from ..config.schema import Config
from ..errors import ConfigError
from . import hosts
from .slurm_script import slurm_script, write_slurm_script


@dataclass(frozen=True)
class Typed:
    """The command line but for the settings, to be typed again elsewhere. switches: flags that were given, with values."""

    switches: list[str]
    script: str
    arguments: list[str]

    @property
    def words(self) -> list[str]:
        return [*self.switches, self.script, *self.arguments]


@dataclass(frozen=True)
class Elsewhere:
    """What was typed for --hostfile, --ssh, --env_file and --slurm_script."""

    hostfile: str | None = None
    ssh: str | None = None
    env_file: str | None = None
    slurm_script: str | None = None

    def is_asked(self) -> bool:
        """Whether this machine is not where the run is to be. Raises ConfigError for flags without an effect."""
        if self.hostfile is not None and self.slurm_script is not None:
            raise ConfigError("--hostfile and --slurm_script contradict each other")
        if self.hostfile is None and self.env_file is not None:
            raise ConfigError("--env_file: has no effect without --hostfile")
        if self.hostfile is None and self.ssh not in (None, environment_value("SHARDWISE_SSH")):
            raise ConfigError("--ssh: has no effect without --hostfile")
        return self.hostfile is not None or self.slurm_script is not None

    def filled(self, settings: Mapping[str, str | bool]) -> dict[str, str | bool]:
        """The settings to check: where machine 0 will be is found out by the job."""
        where: dict[str, str | bool] = {"main_process_ip": "the first machine", "main_process_port": str(TORCH_PORT)}
        return {**(where if self.slurm_script is not None and "num_machines" in settings else {}), **settings}

    def run(
        self,
        config: Config,
        settings: Mapping[str, str | bool],
        typed: Typed,
        environment: Mapping[str, str],
        *,
        dry_run: bool,
    ) -> int:
        """Start it there, or write the script; the exit code. Raises ConfigError or LaunchError."""
        if self.slurm_script is not None:
            text = slurm_script(config, settings, typed.words, typed.script)
            write_slurm_script(text, "-" if dry_run else self.slurm_script)
            return 0
        assert self.hostfile is not None
        found = hosts.read_hosts(self.hostfile)
        file = hosts.environment_file(self.env_file)
        given = {name: value for name, value in environment.items() if name.startswith(hosts.HANDED_ON)}
        if file is not None:
            given |= hosts.read_environment(file)
            print(f"shardwise launch: the hosts are given the variables of {file}", file=sys.stderr)
        lines = hosts.commands(found, settings, typed.words, given, os.getcwd())
        ssh = shlex.split("ssh" if self.ssh is None else self.ssh)
        if not ssh:
            raise ConfigError("--ssh: is empty")
        if dry_run:
            print("\n".join(shlex.join([*ssh, host.name, line]) for host, line in zip(found, lines, strict=True)))
            return 0
        from .ssh import run_on

        return run_on(found, lines, ssh)
