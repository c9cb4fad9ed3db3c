"""Making the process groups of a run, once the ranks have met: see `meeting.py`. With its neighbours that `ranks.py`
names the only caller of torch.distributed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..config.agreement import ranks_said
from ..config.environment import RankEnvironment, forgotten_tasks
from ..errors import ConfigError, RankError
from . import leaving, watcher
from .meeting import Introduction, Place, Verdict, device_index, host_name, judge, meet, missed, not_here, visible_gpus

logger = logging.getLogger("shardwise")


@dataclass(frozen=True)
class Joined:
    """This process among the ranks.

    data, control:    None in a run of one. owned: made here, so that leaving ends them.
    places, machines: by rank, see `Verdict`; empty in a run of one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    timeout: timedelta
    data: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    owned: bool = False
    places: Sequence[Place] = ()
    machines: Sequence[int] = ()


@dataclass(frozen=True)
class _Groups:
    """The groups of a WORLD, weakly, so that they end with it; and who sits where."""

    world: weakref.ref[Any]
    data: weakref.ref[Any]
    control: weakref.ref[Any]
    verdict: Verdict


_made: dict[timedelta, _Groups] = {}


def join_groups(use_cpu: bool, timeout_s: float, problem: Exception | None) -> Joined:
    """Join the run; arguments and errors are those of `Ranks.join`. Collective."""
    place, timeout = RankEnvironment.read(), timedelta(seconds=timeout_s)
    cuda = torch.cuda.is_available() and not use_cpu
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _made_by_the_script(place, cuda, timeout)
    mine = Introduction.of(place, cuda=cuda, timeout_s=timeout_s)
    if place.world_size == 1:
        if problem is not None:
            raise problem
        if not place.launched and (tasks := forgotten_tasks()) is not None:
            logger.warning(
                "SLURM_NTASKS is %d, but srun did not start this process: it is a run of one rank. Start the script with srun "
                "for a run of all.",
                tasks,
            )
        verdict = judge([mine])
        verdict.raise_for(0)
        local_rank, local_world_size, index = verdict.places[0]
        return Joined(0, 1, local_rank, local_world_size, _device(index), timeout)
    store, verdict = _meet(place, mine, timeout, problem)
    if problem is not None:
        raise problem
    verdict.raise_for(place.rank)
    local_rank, local_world_size, index = verdict.places[place.rank]
    device = _device(index)
    arguments: dict[str, Any] = {"device_id": device} if cuda else {}
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        **arguments,
    )
    _publish(cuda)
    data, control, _ = _groups(timeout, mine, verdict)
    watcher.place_board(verdict.places)
    found = (data, control, True, verdict.places, verdict.machines)
    return Joined(place.rank, place.world_size, local_rank, local_world_size, device, timeout, *found)


def _made_by_the_script(place: RankEnvironment, cuda: bool, timeout: timedelta) -> Joined:
    """The run of a script that has called `init_process_group` by itself, in which any variables may be unset."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if (place.rank, place.world_size) != (rank, world_size):
        place = RankEnvironment(rank, world_size, None, None)
    # Settings are compared where the group is used: these ranks have found each other without them.
    mine = Introduction({}, host_name(), place.local_rank, place.local_world_size, visible_gpus() if cuda else None)
    _publish(cuda)
    data, control, verdict = _groups(timeout, mine)
    watcher.place_board(verdict.places)
    local_rank, local_world_size, _ = verdict.places[rank]
    index = device_index(local_rank, mine.gpus)
    if cuda and index is None:
        judge([mine]).raise_for(0)  # the groups may be older than the wish for a GPU
    found = (data, control, False, verdict.places, verdict.machines)
    return Joined(rank, world_size, local_rank, local_world_size, _device(index), timeout, *found)


def _publish(cuda: bool) -> None:
    """Let the others know where this rank publishes what it does, before the first collective."""
    store = dist.distributed_c10d._get_default_store()
    watcher.join_board(dist.get_rank(), dist.group.WORLD, store, devices=cuda)


def _device(index: int | None) -> torch.device:
    if index is None:
        return torch.device("cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _meet(
    place: RankEnvironment, mine: Introduction, timeout: timedelta, problem: Exception | None
) -> tuple[Store, Verdict]:
    """The store from which the groups are made, and the verdict that the ranks came to in it. Collective."""
    if place.address is None or place.port is None:
        missing = "MASTER_ADDR" if place.address is None else "MASTER_PORT"
        raise ConfigError(
            f"{missing} is not set, and nothing else says where rank 0 of these {place.world_size} processes listens. Set "
            "MASTER_ADDR to its machine and MASTER_PORT to a free port there, the same for every process."
        )
    place.export()
    timeout_s = timeout.total_seconds()
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    except Exception as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"MASTER_PORT {place.port} is in use on this machine. Set it to a free port, the same for every rank."
            ) from error
        others = [0] if place.rank else range(1, place.world_size)
        raise RankError(
            f"at {place.address}:{place.port} (MASTER_ADDR, MASTER_PORT): {not_here(others, timeout_s)}"
        ) from error
    leaving.keep(store)
    name, verdict = meet(
        PrefixStore("shardwise", store), place.rank, place.world_size, mine, timeout_s=timeout_s, problem=problem
    )
    return PrefixStore(f"shardwise/{name}", store), verdict


def _groups(
    timeout: timedelta, mine: Introduction, verdict: Verdict | None = None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, Verdict]:
    """The data and the control group of this process, and where every rank sits. Collective where they do not exist yet.

    verdict: where they sit, if they have told each other already.
    A group of gloo has three threads, one of which wakes up a hundred times a second, and torch keeps it until WORLD ends. A
    process that makes many Accelerators would be busy with nothing else: with 450 groups a test suite took twice its time.
    """
    world, held = dist.group.WORLD, _made.get(timeout)
    if held is not None and held.world() is world:
        data, control = held.data(), held.control()
        if data is not None and control is not None:
            return data, control, held.verdict
    try:
        data, control = dist.new_group(timeout=timeout), dist.new_group(backend="gloo", timeout=timeout)
        said: list[Any] = [None] * dist.get_world_size()
        if verdict is None:
            dist.all_gather_object(said, mine, group=control)
    except RuntimeError as error:
        raise missed("its first `Accelerator()` or `PartialState()`", timeout, error) from error
    if verdict is None:
        verdict = judge(said)
        verdict.raise_for(dist.get_rank())
    _made[timeout] = _Groups(weakref.ref(world), weakref.ref(data), weakref.ref(control), verdict)
    return data, control, verdict


# What a communicator moves: each kind has its operations in one order of its own on every rank.
Moves = Literal["shards", "gradients of shards", "copies"]

_communicators: dict[tuple[timedelta, tuple[int, ...], Moves], tuple[weakref.ref[Any], weakref.ref[Any]]] = {}


def communicator(members: tuple[int, ...], moves: Moves, timeout: timedelta) -> dist.ProcessGroup | None:
    """The communicator of these ranks, this one among them, for one kind of tensors; None for one rank. Collective over them.

    It is made once and kept by torch until WORLD ends. Only its own ranks take part, so a run of
    thousands of groups makes none but its own; each rank makes those of its shards first, then that of its copies.
    Raises RankError if one of them does not come.
    """
    if len(members) == 1:
        return None
    world, key = dist.group.WORLD, (timeout, members, moves)
    held = _communicators.get(key)
    if held is not None and held[0]() is world and (found := held[1]()) is not None:
        return found  # type: ignore[no-any-return]
    try:
        made = dist.new_group(list(members), timeout=timeout, use_local_synchronization=True)
    except RuntimeError as error:
        raise missed(f"the making of a communicator of {ranks_said(members)}", timeout, error) from error
    _communicators[key] = weakref.ref(world), weakref.ref(made)
    return made  # type: ignore[no-any-return]


def launchers_store(address: str, port: int, *, holds: bool, timeout_s: float) -> Store:
    """The key-value store through which the launchers of several machines meet; torch's agents use the same one beside them.

    holds: this process is where it lives. Raises RuntimeError, torch's, if nobody answers.
    """
    store = TCPStore(
        address,
        port,
        is_master=holds,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore("shardwise-machines", store)
