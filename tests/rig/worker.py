"""The life of one rank: join the run, then call functions that the pool sends, until the pool closes the pipe.

Messages are pickled bytes both ways. A task is (sys.path, pickled (function, args, kwargs)); a reply is ("value", x) or
("error", exception or None, text). Standard output and error go to a file that the pool quotes when a rank fails, and
so do the stacks that SIGUSR1 asks for.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

MAX_LOCAL_CHARS = 160


@dataclass(frozen=True)
class Place:
    """Which rank this is, how it meets the others, and the files it writes for the pool."""

    rank: int
    world_size: int
    port: int
    backend: str
    log: str
    stacks: str


def serve(pipe: Connection, place: Place) -> None:
    """Be one rank until the pipe closes."""
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # These stay open for the life of the process: a context manager has no place to end.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    stacks = open(place.stacks, "w")  # noqa: SIM115
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest; the pool ends its ranks itself

    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.rank),
        LOCAL_WORLD_SIZE=str(place.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(place.port),
    )
    if place.backend == "gloo" and sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from shardwise.ranks.ranks import Ranks

    torch.set_num_threads(1)
    try:
        ranks = Ranks.join(use_cpu=place.backend == "gloo", timeout_s=300.0)
    except Exception as error:
        pipe.send_bytes(_error_reply(error))
        return
    pipe.send_bytes(pickle.dumps(("value", os.getpid())))
    while True:
        try:
            path, task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        pipe.send_bytes(_perform(ranks, path, task))
        gc.collect()
    # No ranks.leave(): the others may be gone already, and a test's pool owes nobody a clean farewell.
    sys.stdout.flush()
    os._exit(0)


def _perform(ranks: Any, path: list[str], task: bytes) -> bytes:
    import torch

    from .settled import settled

    for entry in reversed(path):
        if entry not in sys.path:
            sys.path.insert(0, entry)
    ranks.counts.clear()
    torch.manual_seed(0)
    try:
        function, args, kwargs = pickle.loads(task)
        with settled(), warnings.catch_warnings():
            warnings.simplefilter("error")
            value = function(ranks, *args, **kwargs)
        return pickle.dumps(("value", value))
    except BaseException as error:  # pytest's own outcomes are BaseExceptions, and every one must reach the test
        return _error_reply(error)


def _error_reply(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error)) + _innermost_locals(error)
    # What cannot travel with the exception must not keep it from travelling: frames, and causes that do not pickle.
    error = error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return pickle.dumps(("error", None, text))
    return pickle.dumps(("error", error, text))


def _innermost_locals(error: BaseException) -> str:
    """The local variables of the innermost frame that is a test's: what an assertion without a message compared."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if f"{os.sep}tests{os.sep}" in frame.f_code.co_filename:
            found = frame
    if found is None:
        return ""
    lines = []
    for name, value in found.f_locals.items():
        try:
            lines.append(f"    {name} = {' '.join(repr(value).split())[:MAX_LOCAL_CHARS]}")
        except Exception as failure:
            lines.append(f"    {name} = <repr failed: {failure}>")
    return f"locals of {found.f_code.co_name}:\n" + "\n".join(lines) + "\n"
