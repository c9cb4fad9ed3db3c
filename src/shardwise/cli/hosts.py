"""A run on the hosts of a file, started from here: what is to be run on each, worked out before anything is.

    worker-1 slots=4        # DeepSpeed's format: a host that ssh knows, and how many processes it takes
    worker-2 slots=4

Each host runs `shardwise launch` with its own --machine_rank; what came with ssh is a shell, so every word is quoted. `ssh.py`
starts these commands and watches them.
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.launchers import TORCH_PORT
from ..errors import ConfigError, LaunchError
from ..files.documents import SETTINGS_NBYTES, read_text

END_WITH_STDIN = "SHARDWISE_END_WITH_STDIN"  # set: the launcher ends when whoever started it is gone
ENVIRONMENT_FILE = ".deepspeed_env"
# Handed on without being named, as DeepSpeed does: without them the other hosts would talk by other rules.
HANDED_ON = ("NCCL_", "GLOO_", "PYTHON", "UCX_")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLACE = ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "num_processes")


@dataclass(frozen=True)
class Host:
    """A host by the name that ssh knows, and the processes that it takes."""

    name: str
    slots: int


def read_hosts(path: str) -> list[Host]:
    """The hosts of a file, in order; the first is machine 0. Raises ConfigError with the line that is wrong."""
    hosts: list[Host] = []
    for number, line in enumerate(read_text(Path(path), ConfigError, SETTINGS_NBYTES).splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9][0-9]*)", words[1]) if len(words) == 2 else None
        if slots is None or _HOST.fullmatch(words[0]) is None:
            raise ConfigError(f"{path}:{number}: {line.strip()!r} is not `HOST slots=N`")
        if any(host.name == words[0] for host in hosts):
            raise ConfigError(f"{path}:{number}: {words[0]} is there twice")
        hosts.append(Host(words[0], int(slots[1])))
    if not hosts:
        raise ConfigError(f"{path}: names no host")
    uneven = next((host for host in hosts if host.slots != hosts[0].slots), None)
    if uneven is not None:
        raise ConfigError(
            f"{path}: {hosts[0].name} has slots={hosts[0].slots} and {uneven.name} slots={uneven.slots}. All machines of a run "
            "have equally many processes: give each the least."
        )
    return hosts


def read_environment(path: Path) -> dict[str, str]:
    """`NAME=VALUE` lines, which each host is given. Raises ConfigError."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path, ConfigError, SETTINGS_NBYTES).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.removeprefix("export ").partition("=")
        if not equals or _NAME.fullmatch(name) is None:
            raise ConfigError(f"{path}:{number}: {text!r} is not NAME=VALUE")
        found[name] = value
    return found


def environment_file(given: str | None) -> Path | None:
    """The file of --env_file; else DeepSpeed's, where it looks for it."""
    if given is not None:
        return Path(given)
    return next((path for path in (Path(ENVIRONMENT_FILE), Path.home() / ENVIRONMENT_FILE) if path.is_file()), None)


def flags_of(settings: Mapping[str, str | bool]) -> list[str]:
    """The settings as they were typed, without those that tell where a machine stands."""
    words: list[str] = []
    for name, value in settings.items():
        if name in _PLACE:
            continue
        words += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", value]
    return words


def commands(
    hosts: Sequence[Host],
    settings: Mapping[str, str | bool],
    rest: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
) -> list[str]:
    """For each host a line of shell. rest: all that follows the settings on the command line.

    Raises ConfigError or LaunchError.
    """
    processes = len(hosts) * hosts[0].slots
    typed = settings.get("num_processes")
    if typed is not None and str(typed) != str(processes):
        raise ConfigError(
            f"--num_processes {typed}: the hosts have {processes} slots; leave it out, or change the file"
        )
    for name in ("num_machines", "machine_rank"):
        if name in settings:
            raise ConfigError(f"--{name}: the file of --hostfile says it; leave it out")
    place = ["--num_processes", str(processes)]
    if len(hosts) > 1:
        address = str(settings.get("main_process_ip") or address_of(hosts))
        port = str(settings.get("main_process_port") or TORCH_PORT)
        place += ["--num_machines", str(len(hosts)), "--main_process_ip", address, "--main_process_port", port]
    variables = [f"{name}={value}" for name, value in sorted({**environment, END_WITH_STDIN: "1"}.items())]
    lines = []
    for machine in range(len(hosts)):
        mine = ["--machine_rank", str(machine)] if len(hosts) > 1 else []
        words = [
            "env",
            *variables,
            sys.executable,
            "-m",
            "shardwise",
            "launch",
            *place,
            *mine,
            *flags_of(settings),
            *rest,
        ]
        lines.append(f"cd {shlex.quote(directory)} && exec {shlex.join(words)}")
    return lines


def address_of(hosts: Sequence[Host]) -> str:
    """Where the others reach the first host, as this machine sees it. Raises LaunchError."""
    first, second = (host.name.rpartition("@")[2] for host in hosts[:2])
    remedy = "Give --main_process_ip, an address by which every host reaches it."
    try:
        address = str(socket.getaddrinfo(first, None, socket.AF_INET)[0][4][0])
        if not address.startswith("127."):
            return address
        # This machine is the first host, and its hosts file gives its name to itself alone.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((second, 9))  # nothing is sent
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise LaunchError(f"the address of {first} is not known here: {error.strerror or error}. {remedy}") from None
    if address.startswith("127."):
        raise LaunchError(f"{first} and {second} are loopback addresses here. {remedy}")
    return address
