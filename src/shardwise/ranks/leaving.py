"""Leaving a run: no thread of a process group may want the interpreter while that ends.

gloo works in threads of its own. A thread that has finished a collective lets go of the tensors in it, and for those of Python
it needs the interpreter. If the interpreter begins to end before the thread gets it, CPython ends the thread by unwinding it,
through destructors that may not be unwound:

    main thread     ... all_reduce returns . last line . Py_FinalizeEx ..................
    gloo's thread   ... done . ~AsyncWork . ~Tensor . gil_scoped_acquire ... pthread_exit -> std::terminate, SIGABRT

It takes a busy machine and a script that ends soon after a collective. So the groups are taken down first, and what held
them lets go: with its last reference a group joins its threads. A collective that other ranks may never come to is not waited
for without end; its work is kept for good, so that its thread has nothing to destroy.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
import time
import traceback
import weakref
from typing import Protocol

import torch.distributed as dist

# Its functions have the WORLD of the moment of their import as a default argument. torch._dynamo imports it in mid-run, and
# that WORLD would be held for good: so it is imported here, before there is one.
import torch.distributed.nn.functional  # noqa: F401
from torch.distributed import Store  # type: ignore[attr-defined]

from . import unfinished, watcher
from .control import Vote

# How long a vote that this rank did not wait for may take to come to its end. After an error of the script the other ranks may
# be waiting for this one, and learn of its end only by that.
_VOTE_WITHIN_S, _VOTE_AFTER_ERROR_S = 5.0, 1.0
# How long the ranks wait for each other before they end with an error that all have found behind their scripts.
_TOGETHER_WITHIN_S = 60.0
# For threads of groups that somebody else holds: what they were about to do, they do in this time.
_MOMENT_S = 0.05
_END = "shardwise/end"


class Member(Protocol):
    """What holds process groups: the `Ranks` of this process, and those aside."""

    def let_go(self) -> tuple[list[dist.ProcessGroup], Vote | None]:
        """The groups, and a vote under way in the last of them. The member itself forgets both."""
        ...


_members: weakref.WeakSet[Member] = weakref.WeakSet()
_own_world: weakref.ref[dist.ProcessGroup] | None = None
_process = os.getpid()
_stores: list[Store] = []


def keep(store: Store) -> None:
    """Hold the store by which the ranks met until the process ends, or the next one comes.

    A rank that joins again sooner than rank 0 would else reach the store that is about to end with rank 0's last run.
    """
    _stores[:] = [store]


def remember(member: Member, *, made_world: bool) -> None:
    """Have `member` leave before the interpreter ends. made_world: WORLD was made for it, and goes too."""
    global _own_world, _process  # noqa: PLW0603 - there is one WORLD in a process
    _process = os.getpid()
    _members.add(member)
    if made_world and dist.group.WORLD is not None:
        _own_world = weakref.ref(dist.group.WORLD)
    atexit.unregister(_leave)
    atexit.register(_leave)  # anew: before whatever was registered until now


def take_down(groups: list[dist.ProcessGroup], *, world: bool) -> None:
    """Destroy `groups`, and with `world` every group of this process; return when their threads have ended.

    groups: the caller's only references; empty afterwards.
    """
    left = [weakref.ref(group) for group in groups]
    if world:
        assert dist.group.WORLD is not None
        left.append(weakref.ref(dist.group.WORLD))
        groups.clear()
        dist.destroy_process_group()
    while groups:
        with contextlib.suppress(ValueError):  # whoever owns WORLD has destroyed it
            dist.destroy_process_group(groups.pop())
    if any(ref() is not None for ref in left):
        _clear_frames()
        gc.collect()
    if any(ref() is not None for ref in left):
        time.sleep(_MOMENT_S)


def _leave() -> None:
    """Before the interpreter ends: let every member go, and take down what gloo runs of it.

    Groups of NCCL stay: their threads want nothing of the interpreter, and to end them in order one waits for the other ranks.
    """
    if os.getpid() != _process:
        return  # a forked child: the threads are its parent's
    if unfinished.failed_everywhere():
        _end_together()
    watcher.interpreter_ends()
    try:
        _take_down_all()
    finally:
        _stores.clear()


def _end_together() -> None:
    """Return when every rank has come here: a launcher that sees one fail ends the others.

    So what a rank does at its end, as a tracker that sends its last numbers, is done by then.
    """
    if not dist.is_initialized():
        return
    deadline, pause_s = time.monotonic() + _TOGETHER_WITHIN_S, 1e-3
    with contextlib.suppress(RuntimeError):  # the process that has the store has gone on
        store = dist.distributed_c10d._get_default_store()
        store.add(_END, 1)
        while store.add(_END, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)


def _take_down_all() -> None:
    groups: list[dist.ProcessGroup] = []
    for member in list(_members):
        held, vote = member.let_go()
        groups += [group for group in held if group not in groups]
        if vote is not None and not vote.ends_within(_vote_limit_s()):
            for item in (vote, held[-1]):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
        del held, vote
    if not dist.is_initialized():
        groups.clear()
        return
    own = _own_world is not None and _own_world() is dist.group.WORLD
    gloo = _is_gloo(dist.group.WORLD)
    groups[:] = [group for group in groups if _is_gloo(group) and group is not dist.group.WORLD]
    take_down(groups, world=own and gloo)
    if gloo and not own:  # the script made it, and may need it still
        time.sleep(_MOMENT_S)


def _is_gloo(group: dist.ProcessGroup | None) -> bool:
    try:
        return dist.get_backend(group) == "gloo"
    except ValueError:  # destroyed
        return False


def _vote_limit_s() -> float:
    """How long a vote may take to come to its end."""
    return _VOTE_WITHIN_S if getattr(sys, "last_value", None) is None else _VOTE_AFTER_ERROR_S


def _clear_frames() -> None:
    """Drop the local variables of the frames that an error came through which is still held: a collective's hold its group.

    That is the script's last one, and what was found behind it.
    """
    waiting: list[BaseException | None] = [getattr(sys, "last_value", None), *unfinished.owed()]
    seen: list[BaseException] = []
    while waiting:
        error = waiting.pop()
        while error is not None and error not in seen:
            seen.append(error)
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
