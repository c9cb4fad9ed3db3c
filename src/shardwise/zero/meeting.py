"""How processes become ranks: before any process group exists they tell each other what they are, and one of them judges.

Ranks whose backends, devices, timeouts or versions differ cannot even make a process group together: torch waits, or aborts.
So they meet in the key-value store from which the groups are made, where every rank can be told the same.

    rank 0   says, reads what all said, writes the verdict      a place on its machine and a device for each rank, or
    rank r   says, waits for the verdict                        the one error of all

What is said is plain JSON whose form does not change, so that ranks of different versions understand that they are. Nothing
here calls torch.distributed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any, Protocol

import torch

from .. import version
from ..config.agreement import SAME_EVERYWHERE, VERSIONS, differences, disagreement, ranks_said
from ..config.environment import RankEnvironment, torch_debug
from ..errors import ConfigError, RankError

logger = logging.getLogger("shardwise")

_FIRST_POLL_S, _SLOWEST_POLL_S = 0.001, 0.05
_SAY_WHO_IS_MISSING_AFTER_S = 30.0
_LET_THE_OTHERS_READ_S = 10.0


class Store(Protocol):
    """What of torch's key-value stores is used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


# A rank's number on its machine, how many ranks are there, and the index of its CUDA device or None.
Place = tuple[int, int, int | None]


@dataclass(frozen=True)
class Introduction:
    """What a rank says of itself.

    facts: what all ranks must have in common, by the name that an error gives it.
    host:  tells machines apart. local_rank, local_world_size: as its launcher said, or None.
    gpus:  the names of the CUDA devices that it sees, in order; None if it computes on the CPU.
    """

    facts: Mapping[str, Any]
    host: str
    local_rank: int | None = None
    local_world_size: int | None = None
    gpus: list[str] | None = None

    @classmethod
    def of(cls, place: RankEnvironment, *, cuda: bool, timeout_s: float) -> Introduction:
        """This process's own."""
        facts = {
            **versions(),
            "the number of processes": place.world_size,
            "the device": "cuda" if cuda else "cpu",
            "shardwise_config.collective_timeout_s": timeout_s,
            "TORCH_DISTRIBUTED_DEBUG": torch_debug(),
        }
        return cls(facts, host_name(), place.local_rank, place.local_world_size, visible_gpus() if cuda else None)

    @classmethod
    def read(cls, text: str | bytes) -> Introduction:
        """From the text of another rank; of another version's, what is known here."""
        said = json.loads(text)
        known = {name: said[name] for name in cls.__dataclass_fields__ if name in said}
        return cls(**{"facts": {}, "host": "", **known})


@dataclass(frozen=True)
class Verdict:
    """What follows for every rank.

    places:  by rank.
    problem: a ConfigError's text, for every rank.
    failed:  a rank that met an error of its own, with its words; late: ranks that did not come.
    """

    places: list[Place] = field(default_factory=list)
    problem: str | None = None
    failed: tuple[int, str] | None = None
    late: str | None = None

    @property
    def good(self) -> bool:
        return self.problem is None and self.failed is None and self.late is None

    def raise_for(self, rank: int) -> None:
        """The error that this rank raises, if there is one."""
        if self.problem is not None:
            raise ConfigError(self.problem)
        if self.failed is not None and self.failed[0] != rank:
            raise RankError(f"rank {self.failed[0]} failed: {self.failed[1]}")
        if self.late is not None:
            raise RankError(self.late)


def versions() -> dict[str, str]:
    """What must be equal for messages and numbers to be."""
    return dict(zip(VERSIONS, (version.__version__, str(torch.__version__)), strict=True))


def visible_gpus() -> list[str]:
    """A name for each CUDA device that this process sees, which another process gives it too."""
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [str(getattr(device, "uuid", f"of index {index}")) for index, device in enumerate(devices)]


def host_name() -> str:
    """A name that processes share if and only if they run on one machine and see the same devices.

    Machines that are copies may have one host name, and containers of one machine one boot: together they tell.
    """
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{gethostname()} {boot}".strip()


def judge(said: Sequence[Introduction]) -> Verdict:
    """What follows from what the ranks said, in rank order."""
    differing = differences([rank.facts for rank in said])
    if differing:
        return Verdict(problem=disagreement("{ranks} of this run differ", differing, SAME_EVERYWHERE))
    by_host: dict[str, list[int]] = {}
    for rank, one in enumerate(said):
        by_host.setdefault(one.host, []).append(rank)
    places: list[Place] = []
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, one in enumerate(said):
        here = by_host[one.host]
        local_rank = here.index(rank) if one.local_rank is None else one.local_rank
        index = device_index(local_rank, one.gpus)
        if one.gpus is not None and index is None:
            return Verdict(
                problem=f"rank {rank} wants cuda:{local_rank}, but this machine shows {len(one.gpus)} CUDA device(s). Start at "
                "most one process per device, or add --use_cpu."
            )
        if one.gpus is not None and index is not None:
            holders.setdefault((one.host, one.gpus[index]), []).append(rank)
        places.append((local_rank, len(here) if one.local_world_size is None else one.local_world_size, index))
    for (host, gpu), ranks in holders.items():
        if len(ranks) > 1:
            return Verdict(
                problem=f"{ranks_said(ranks)} of {host.split()[0]} would share one GPU ({gpu}). Set LOCAL_RANK for each "
                "process, or let CUDA_VISIBLE_DEVICES show each a GPU of its own; start at most one process per GPU."
            )
    return Verdict(places)


def device_index(local_rank: int, gpus: Sequence[str] | None) -> int | None:
    """The CUDA device of a rank: that of its number, or the only one that it sees, where a scheduler gives each its own."""
    if gpus is None:
        return None
    return local_rank if local_rank < len(gpus) else 0 if len(gpus) == 1 else None


def meet(store: Store, rank: int, mine: Introduction, *, timeout_s: float, problem: Exception | None = None) -> Verdict:
    """Tell the other ranks what this one is, and give the verdict on all. Collective.

    problem: what keeps this rank from joining; the others are told and do not wait for it.
    """
    world_size = int(mine.facts["the number of processes"])
    if problem is not None:
        _decide(store, Verdict(failed=(rank, f"{type(problem).__name__}: {problem}")))
    elif store.add(f"taken/{rank}", 1) > 1:
        text = f"RANK {rank} was given to two processes. Each process needs a number of its own, from 0 to {world_size - 1}."
        _decide(store, Verdict(problem=text))
    else:
        store.set(f"rank/{rank}", json.dumps(asdict(mine)))
        if rank == 0:
            _decide(store, _collect(store, world_size, timeout_s))
    try:
        # Rank 0 may come later than this one, and then waits as long for the rest.
        store.wait(["verdict"], timedelta(seconds=2 * timeout_s))
    except Exception as error:
        raise RankError(not_here([0], 2 * timeout_s)) from error
    said = json.loads(store.get("verdict"))
    verdict = Verdict(**{name: said[name] for name in Verdict.__dataclass_fields__ if name in said})
    if not verdict.good:
        _part(store, rank, world_size, all_will_come=verdict.failed is not None)
    return verdict


def not_here(ranks: Sequence[int], timeout_s: float) -> str:
    """Who has not come, and why that may be."""
    return (
        f"{ranks_said(ranks)} did not join the run within {timeout_s:g} s. Perhaps it has ended, was never started, runs "
        "another version of shardwise, or its script makes no Accelerator. A slow start needs a larger collective_timeout_s."
    )


def missed(where: str, timeout: timedelta, error: Exception) -> RankError:
    """For an error of torch's in a message that all ranks send at `where`: one has not come in time, or is gone."""
    within = f"{timeout.total_seconds():g} s"
    return RankError(f"not every rank came to {where} within {within}, or one has ended: {error}")


def _decide(store: Store, verdict: Verdict) -> None:
    """Write the verdict, unless there is one."""
    store.compare_set("verdict", "", json.dumps(asdict(verdict)))


def _collect(store: Store, world_size: int, timeout_s: float) -> Verdict:
    """On rank 0: the verdict on all ranks, as soon as it can be known."""
    began, pause, told = time.monotonic(), _FIRST_POLL_S, False
    keys = [f"rank/{rank}" for rank in range(world_size)]
    while not store.check(keys):
        if store.check(["verdict"]):
            return Verdict()  # another rank's stands
        waited = time.monotonic() - began
        late = waited > timeout_s
        if late or (waited > _SAY_WHO_IS_MISSING_AFTER_S and not told):
            missing = [rank for rank in range(world_size) if not store.check([f"rank/{rank}"])]
            if late:
                return Verdict(late=not_here(missing, timeout_s))
            logger.warning("Waiting for %s to join the run.", ranks_said(missing))
            told = True
        time.sleep(pause)
        pause = min(1.5 * pause, _SLOWEST_POLL_S)
    return judge([Introduction.read(store.get(key)) for key in keys])


def _part(store: Store, rank: int, world_size: int, *, all_will_come: bool) -> None:
    """The store may end with rank 0's process: it stays until those have read the verdict who have come, or soon will."""
    if rank != 0:
        store.set(f"read/{rank}", "1")
        return
    others = [other for other in range(1, world_size) if all_will_come or store.check([f"rank/{other}"])]
    with suppress(Exception):  # one that has ended reads nothing
        store.wait([f"read/{other}" for other in others], timedelta(seconds=_LET_THE_OTHERS_READ_S))
