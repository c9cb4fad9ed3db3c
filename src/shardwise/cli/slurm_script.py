"""A batch script for Slurm that starts a run as it was typed: one launcher for each machine, which finds its place itself."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.schema import Config
from ..errors import ConfigError, LaunchError
from .hosts import flags_of


def slurm_script(config: Config, settings: Mapping[str, str | bool], rest: Sequence[str], script: str) -> str:
    """The text. rest: all that follows the settings on the command line. Every word of it is quoted for the shell.

    Raises ConfigError where the number of processes is not known: the machines of the job are not this one.
    """
    machines = config.num_machines
    if config.num_processes is None:
        raise ConfigError(
            "--slurm_script: needs --num_processes, of all machines together: those of the job are not this one"
        )
    if "machine_rank" in settings:
        raise ConfigError("--machine_rank: srun says it; leave it out of --slurm_script")
    each = config.num_processes // machines
    name = (
        "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in Path(script).stem) or "shardwise"
    )
    lines = ["#!/bin/bash", f"#SBATCH --job-name={name}", f"#SBATCH --nodes={machines}", "#SBATCH --ntasks-per-node=1"]
    if not config.use_cpu:
        lines.append(f"#SBATCH --gpus-per-node={each}")
    lines += [
        "#SBATCH --exclusive",
        "# The warning reaches the ranks, where a script may save.",
        "#SBATCH --signal=USR1@120",
        "# Add what your cluster wants: #SBATCH --partition, --account, --time.",
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
    ]
    place = ["--num_processes", str(config.num_processes)]
    words = shlex.join([sys.executable, "-m", "shardwise", "launch", *place])
    if machines > 1:
        # Known to the job alone: the first of its machines, and a port that no other job of a machine takes.
        lines.append('address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        words += f" --num_machines {machines}"
        words += ' --main_process_ip "$address" --main_process_port $((15000 + SLURM_JOB_ID % 15000))'
    lines.append(f"srun --kill-on-bad-exit=1 {words} {shlex.join([*flags_of(settings), *rest])}")
    return "\n".join(lines) + "\n"


def write_slurm_script(text: str, target: str) -> None:
    """To a new file, or to the terminal for `-`. Raises LaunchError."""
    if target == "-":
        print(text, end="")
        return
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise LaunchError(f"--slurm_script: {target}: cannot be written: {error.strerror}") from None
    print(f"shardwise launch: sbatch {shlex.quote(target)} starts it", file=sys.stderr)
