"""Machines of a test: network namespaces on one bridge, each with a host name and a hosts file of its own.

    hub         a user namespace, so that no right is needed, with a bridge; ends with the test, and all below with it
    machine m   a network, a host name and mounts of its own; 10.77.0.(m + 1) on `eth0`

Nothing leaves the hub: it has no way out. A machine is a process that waits; commands enter its namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


@cache
def why_not() -> str | None:
    """Why no machines can be made here; None if they can."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    trial = "ip link add a0 type veth peer name a1 && ip link add b0 type bridge && mount -t tmpfs none /mnt"
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "sh", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no network namespaces: {done.stderr.strip()[:200]}" if done.returncode else None


class Machines:
    """`count` machines. Use as a context manager.

    hosts: text of each machine's /etc/hosts; None for a name of its own at 127.0.1.1, as Debian has it.
    """

    def __init__(self, count: int, folder: Path, hosts: str | None = None) -> None:
        self._count, self._folder, self._hosts = count, folder, hosts
        self._sleepers: list[subprocess.Popen[str]] = []
        self._pids: list[int] = []

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def __enter__(self) -> Machines:
        spaces = ("--user", "--map-root-user", "--net", "--mount", "--uts")
        hub = self._sleep([], spaces, "ip link add hub type bridge; ip link set hub up; ip link set lo up")
        for machine in range(self._count):
            text = f"127.0.0.1 localhost\n127.0.1.1 m{machine}\n" if self._hosts is None else self._hosts
            hosts = self._folder / f"hosts-{machine}"
            hosts.write_text(text)
            names = self._folder / "nsswitch.conf"
            names.write_text("hosts: files\n")  # nobody is asked, who would have to time out
            mounts = f"mount --bind {hosts} /etc/hosts; mount --bind {names} /etc/nsswitch.conf"
            setup = f"hostname m{machine}; {mounts}; ip link set lo up"
            sleeper = self._sleep(enter(hub), ("--net", "--mount", "--uts"), setup)
            self._pids.append(sleeper)
            self._inside(hub, f"ip link add v{machine} type veth peer name eth0 netns {sleeper}")
            self._inside(hub, f"ip link set v{machine} master hub; ip link set v{machine} up")
            self._inside(sleeper, f"ip addr add {self.address(machine)}/24 dev eth0; ip link set eth0 up")
        return self

    def _sleep(self, entered: Sequence[str], spaces: Sequence[str], setup: str) -> int:
        sleeper = subprocess.Popen(
            [*entered, "unshare", *spaces, "--kill-child", "--fork", "sh", "-ec", f"{setup}; echo $$; exec cat"],
            stdin=subprocess.PIPE,  # it ends with the test, however that ends
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._sleepers.append(sleeper)
        assert sleeper.stdout is not None
        return int(sleeper.stdout.readline())  # there is no namespace of process ids

    def _inside(self, pid: int, command: str) -> None:
        subprocess.run([*enter(pid), "sh", "-ec", command], check=True, capture_output=True)

    def start(self, machine: int, command: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
        """A process on that machine, in this one's working directory, with pipes for its output, in a session of its own."""
        there = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]
        return subprocess.Popen(
            [*enter(self._pids[machine]), *there, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **settings,
        )

    def cut(self, machine: int) -> None:
        """Pull the machine's cable."""
        self._inside(self._pids[machine], "ip link set eth0 down")

    def __exit__(self, *error: object) -> None:
        for sleeper in reversed(self._sleepers):
            os.killpg(sleeper.pid, signal.SIGKILL)
            sleeper.wait()
            assert sleeper.stdout is not None
            assert sleeper.stdin is not None
            sleeper.stdout.close()
            sleeper.stdin.close()


def enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--preserve-credentials", "--net", "--mount", "--uts"]
