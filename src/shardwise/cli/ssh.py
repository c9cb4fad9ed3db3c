"""One process for each host, through ssh or what stands in its place: output by host, one end for all.

The far end of ssh does not hear this process's signals. It holds a pipe instead: when that is closed, because this process ends
in any way, the launcher on the host ends its ranks and itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from ..errors import LaunchError
from .hosts import Host

# After a host has failed the others end by themselves, as their launchers agree; then they are asked, then their ssh is killed.
ENDS_BY_ITSELF_S, ENDS_WHEN_ASKED_S = 60.0, 45.0
_SSH_FAILED = 255


def run_on(hosts: Sequence[Host], lines: Sequence[str], ssh: Sequence[str]) -> int:
    """Run a line of shell on each host to the end of all; 0, or the code of the first that failed, which is named.

    ssh: the program and its options, before the host and the line. Raises LaunchError if it cannot be run.
    """
    started: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for host, line in zip(hosts, lines, strict=True):
            started.append(_start([*ssh, host.name, line], ssh[0]))
            readers += [
                _forward(started[-1].stdout, host.name, sys.stdout),
                _forward(started[-1].stderr, host.name, sys.stderr),
            ]
        return _Watch(hosts, started).run()
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reader in readers:
            reader.join(2)


def _start(command: list[str], program: str) -> subprocess.Popen[str]:
    try:
        # In a session of its own: a Ctrl-C is for this process, which asks the hosts.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError(f"--ssh: {program}: cannot be run: {error.strerror}") from None


def _forward(source: IO[str] | None, name: str, target: IO[str]) -> threading.Thread:
    """Copy lines, with the host before each."""

    def copy() -> None:
        assert source is not None
        for line in source:
            with suppress(OSError, ValueError):
                target.write(f"{name}: {line.rstrip(os.linesep)}\n")
                target.flush()

    thread = threading.Thread(target=copy, name=f"shardwise-{name}", daemon=True)
    thread.start()
    return thread


class _Watch:
    """Looks after the processes until all have ended."""

    def __init__(self, hosts: Sequence[Host], started: Sequence[subprocess.Popen[str]]) -> None:
        self._hosts, self._started = hosts, started
        self._first: tuple[str, int] | None = None
        self._stopped = 0
        self._asked_s: float | None = None

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)
        failed_s: float | None = None
        while any(process.poll() is None for process in self._started):
            self._look()
            now = time.monotonic()
            if self._first is not None and failed_s is None:
                failed_s = now
            if failed_s is not None and now - failed_s > ENDS_BY_ITSELF_S:
                self._ask()
            if self._asked_s is not None and now - self._asked_s > ENDS_WHEN_ASKED_S:
                self._kill()
            time.sleep(0.05)
        self._look()
        if self._stopped:
            return 128 + self._stopped
        return 0 if self._first is None else self._first[1]

    def _look(self) -> None:
        for host, process in zip(self._hosts, self._started, strict=True):
            code = process.poll()
            if code and self._first is None:
                self._first = host.name, 128 - code if code < 0 else code
                why = ", which is ssh's own where it has no connection" if code == _SSH_FAILED else ""
                if not self._stopped:
                    print(
                        f"shardwise launch: {host.name} ended first, with exit code {code}{why}",
                        file=sys.stderr,
                        flush=True,
                    )

    def _stop(self, number: int, frame: object) -> None:
        if self._stopped:
            self._kill()
            return
        self._stopped = number
        print(
            f"\nshardwise launch: {signal.Signals(number).name}: the hosts are asked to stop; again kills",
            file=sys.stderr,
        )
        self._ask()

    def _ask(self) -> None:
        if self._asked_s is None:
            self._asked_s = time.monotonic()
            for process in self._started:
                assert process.stdin is not None
                with suppress(OSError):
                    process.stdin.close()

    def _kill(self) -> None:
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def end_with_stdin() -> None:
    """In the launcher on a host: end as by SIGTERM when the pipe that it was given as its input is closed."""
    pipe = os.dup(0)
    os.set_inheritable(pipe, False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while True:
            with suppress(OSError):
                if os.read(pipe, 4096):
                    continue
            os.kill(os.getpid(), signal.SIGTERM)
            return

    threading.Thread(target=wait, name="shardwise-stdin", daemon=True).start()
