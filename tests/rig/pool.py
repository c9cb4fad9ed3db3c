"""The test's side of the rig: pools of rank processes, and the judgement of how a run of a function ended.

One `Worlds` per session holds at most one live pool per world size and backend. All waiting is done here, in the
parent, with one deadline: a rank never has to notice by itself that another one is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from .ends import free_port
from .worker import Place, serve

START_TIMEOUT_S = 240.0  # the first start imports torch, transformers and peft
RUN_TIMEOUT_S = 120.0
GRACE_S = 2.0  # what the other ranks get to finish or fail by themselves once one has failed
LOG_LINES = 40


class RankCrashedError(Exception):
    """A rank's process ended in the middle of a function: `rank`, and `exitcode` (negative: killed by that signal)."""

    def __init__(self, rank: int, exitcode: int | None, detail: str) -> None:
        super().__init__(rank, exitcode, detail)
        self.rank = rank
        self.exitcode = exitcode
        self.detail = detail

    def __str__(self) -> str:
        how = f"exit code {self.exitcode}"
        if self.exitcode is not None and self.exitcode < 0:
            how = signal.Signals(-self.exitcode).name
        return f"rank {self.rank} died: {how}\n{self.detail}"


class RanksHungError(Exception):
    """Ranks did not return in time. `ranks` lists them; the text has the stack of every one."""

    def __init__(self, ranks: list[int], timeout_s: float, detail: str) -> None:
        super().__init__(ranks, timeout_s, detail)
        self.ranks = ranks
        self.timeout_s = timeout_s
        self.detail = detail

    def __str__(self) -> str:
        return f"ranks {self.ranks} did not return within {self.timeout_s:.0f} s\n{self.detail}"


class RankRaisedError(Exception):
    """Stands in for an exception that could not be pickled; its notes hold the text."""


@dataclass
class _Rank:
    process: BaseProcess
    pipe: Connection
    log: Path
    stacks: Path


class World:
    """`size` rank processes that have joined each other. `alive` is False once a run has failed."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        self.alive = True
        self._folder = Path(tempfile.mkdtemp(prefix="shardwise-rig-"))
        self._ranks: list[_Rank] = []
        context = _fork_server()
        port = free_port()
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe()
            log, stacks = self._folder / f"rank{rank}.log", self._folder / f"rank{rank}.stacks"
            process = context.Process(
                target=serve, args=(theirs, Place(rank, size, port, backend, str(log), str(stacks))), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, log, stacks))
        self._collect(START_TIMEOUT_S)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = RUN_TIMEOUT_S, **kwargs: Any
    ) -> list[Any]:
        """Call `function(ranks, *args, **kwargs)` on every rank and return what each returned, in rank order.

        function: importable by name (module level). Arguments and results travel by pickle; tensors are copied.
        Every warning inside is an error, the random seed is 0 and `ranks.counts` is empty at the start; a setting of torch
        that the function leaves changed is an error, too.
        Raises the exception of the first rank that raised, RankCrashedError, or RanksHungError.
        """
        assert self.alive, "this pool has failed; ask `world(n)` for a fresh one"
        message = pickle.dumps((sys.path, pickle.dumps((function, args, kwargs))))
        for rank in self._ranks:
            try:
                rank.pipe.send_bytes(message)
            except OSError:  # it died between two runs: _collect sees the end of the pipe and says so
                pass
        return self._collect(timeout_s)

    def close(self) -> None:
        """End the processes. Closing the pipe is what tells a rank to leave; a rank that does not is killed."""
        self.alive = False
        for rank in self._ranks:
            rank.pipe.close()
        deadline = time.monotonic() + GRACE_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            if rank.process.exitcode is None:
                rank.process.kill()
                rank.process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _collect(self, timeout_s: float) -> list[Any]:
        values: dict[int, Any] = {}
        errors: list[tuple[int, BaseException | None, str]] = []
        crashed: list[int] = []
        waiting = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                number = waiting.pop(pipe)  # type: ignore[index]
                try:
                    reply = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    crashed.append(number)
                else:
                    if reply[0] == "value":
                        values[number] = reply[1]
                    else:
                        errors.append((number, reply[1], reply[2]))
                if crashed or errors:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if not (waiting or errors or crashed):
            return [values[number] for number in range(self.size)]
        late = sorted(waiting.values())
        failure = self._explain(errors, crashed, late, timeout_s)
        self.close()
        raise failure

    def _explain(
        self, errors: list[tuple[int, BaseException | None, str]], crashed: list[int], late: list[int], timeout_s: float
    ) -> BaseException:
        stacks = "".join(self._stack(number) for number in late)
        others = "".join(f"--- rank {number} raised:\n{text}" for number, _, text in errors)
        logs = "".join(self._log_tail(number) for number in range(self.size))
        if crashed:
            first = self._ranks[crashed[0]]
            first.process.join(GRACE_S)
            return RankCrashedError(
                crashed[0], first.process.exitcode, self._fault(crashed[0]) + others + stacks + logs
            )
        if errors:
            number, error, text = errors[0]
            failure = error if error is not None else RankRaisedError(text.strip().splitlines()[-1])
            failure.add_note(f"--- raised on rank {number} of {self.size}:\n{text}")
            for other, _, words in errors[1:]:
                failure.add_note(f"--- rank {other} raised:\n{words}")
            if stacks:
                failure.add_note(f"--- meanwhile:\n{stacks}")
            if logs:
                failure.add_note(logs)
            return failure
        return RanksHungError(late, timeout_s, stacks + logs)

    def _stack(self, number: int) -> str:
        """Where a rank that has not returned is now, asked by SIGUSR1; faulthandler answers even from inside C code."""
        rank = self._ranks[number]
        before = rank.stacks.stat().st_size if rank.stacks.exists() else 0
        if rank.process.pid is not None and rank.process.exitcode is None and rank.stacks.exists():
            os.kill(rank.process.pid, signal.SIGUSR1)
            deadline = time.monotonic() + 1.0
            while rank.stacks.stat().st_size == before and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.05)
        return f"--- rank {number} is still in:\n{self._fault(number, before)}"

    def _fault(self, number: int, start: int = 0) -> str:
        path = self._ranks[number].stacks
        return path.read_text(errors="replace")[start:] if path.exists() else ""

    def _log_tail(self, number: int) -> str:
        path = self._ranks[number].log
        lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:] if path.exists() else []
        return f"--- last output of rank {number}:\n" + "\n".join(lines) + "\n" if lines else ""


class Worlds:
    """The pools of a session: `worlds(2)` is the live pool of two ranks, started when first asked for."""

    def __init__(self) -> None:
        self._live: dict[tuple[int, str], World] = {}

    def __call__(self, size: int, backend: str = "gloo") -> World:
        found = self._live.get((size, backend))
        if found is None or not found.alive:
            found = self._live[size, backend] = World(size, backend)
        return found

    def close(self) -> None:
        for pool in self._live.values():
            if pool.alive:
                pool.close()
        self._live.clear()


def _fork_server() -> multiprocessing.context.BaseContext:
    """The context that forks ranks from a server which has imported `preload`. Starting it twice is harmless."""
    from multiprocessing import forkserver

    tests = str(Path(__file__).resolve().parents[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rig.preload"])
    # The server and all ranks inherit this environment: it finds `rig` by PYTHONPATH, and each rank computes on one
    # thread (design.md section 4: libgomp collapses when ranks >= cores).
    wanted = {
        "PYTHONPATH": os.pathsep.join([tests, *(entry for entry in sys.path if entry)]),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context
