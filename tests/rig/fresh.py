"""Processes that have joined nothing yet: forked from the rig's server, each with an environment of its own, for one function.

    outcomes = fresh_ranks(function, torchrun(2), timeout_s=20)       # one Outcome for each process, in order
    ran = run_script("benchmarks/loss.py", ["--tiny"], torchrun(2))   # a whole program, as torchrun would start it

What a pool cannot show is here: how ranks meet, what each raises while they do, and with which exit code a process ends.
"""

from __future__ import annotations

import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .ends import free_port, print_into, rank_variables
from .pool import _fork_server

_LAUNCHERS = ("SLURM", "OMPI", "PMI", "MPI_", "PALS", "TORCHELASTIC", "MASTER_", "LOCAL_", "SHARDWISE", "GROUP_")


@dataclass(frozen=True)
class Outcome:
    """What a process returned, or the error's type and text; its exit code, None if it had to be killed."""

    value: Any
    error: str | None
    code: int | None
    seconds: float


def torchrun(n: int, **more: str) -> list[dict[str, str]]:
    """The environments of n ranks on one machine."""
    port = free_port()
    return [{**rank_variables(rank, n, port), **more} for rank in range(n)]


def fresh_ranks(
    function: Callable[..., Any], environments: Sequence[Mapping[str, str]], *args: Any, timeout_s: float = 60.0
) -> list[Outcome]:
    """Call `function(*args)` in a new process for each environment, all at once. Importable by name, as for a pool."""
    context = _fork_server()
    running = []
    for environment in environments:
        ours, theirs = context.Pipe(duplex=False)
        task = pickle.dumps((sys.path, pickle.dumps((function, args))))
        process = context.Process(target=_serve, args=(theirs, dict(environment), task))
        process.start()
        theirs.close()
        running.append((process, ours))
    began = time.monotonic()  # the first start may have waited for the server's imports
    found = []
    for process, pipe in running:
        reply: tuple[Any, str | None] = (None, None)
        try:
            if pipe.poll(max(0.0, began + timeout_s - time.monotonic())):
                reply = pickle.loads(pipe.recv_bytes())
        except EOFError:
            pass
        process.join(max(0.1, began + timeout_s - time.monotonic()))
        seconds = time.monotonic() - began
        if process.exitcode is None:
            process.kill()
            process.join()
            found.append(Outcome(*reply, None, seconds))
        else:
            found.append(Outcome(*reply, process.exitcode, seconds))
    return found


@dataclass(frozen=True)
class Ran:
    """A program on all ranks: the first exit code that is not 0 (-1 for one that had to be killed), and what they printed."""

    returncode: int
    stdout: str
    stderr: str


def run_script(
    script: Path, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], *, timeout_s: float = 150.0
) -> Ran:
    """Run a program in forked ranks, as `python script arguments`: most of a tiny run is imports, and they are there."""
    with tempfile.TemporaryDirectory() as folder:
        found = fresh_ranks(_be_script, environments, script, list(arguments), folder, timeout_s=timeout_s)
        texts = {
            kind: "".join(path.read_text() for path in sorted(Path(folder).glob(f"{kind}-*")))
            for kind in ("stdout", "stderr")
        }
    codes = [-1 if outcome.code is None else outcome.code for outcome in found]
    return Ran(next((code for code in codes if code), 0), **texts)


def _be_script(script: Path, arguments: list[str], folder: str) -> None:
    for number, kind in ((1, "stdout"), (2, "stderr")):
        getattr(sys, kind).flush()
        print_into(Path(folder, f"{kind}-{os.environ['RANK']}"), number)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve(pipe: Connection, environment: dict[str, str], task: bytes) -> None:
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(_LAUNCHERS):
            del os.environ[name]
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    path, call = pickle.loads(task)
    sys.path[:0] = [entry for entry in path if entry not in sys.path]
    function, args = pickle.loads(call)
    try:
        value = function(*args)
    except Exception as error:
        traceback.print_exc()
        pipe.send_bytes(pickle.dumps((None, f"{type(error).__name__}: {error}")))
        sys.exit(1)
    pipe.send_bytes(pickle.dumps((value, None)))
