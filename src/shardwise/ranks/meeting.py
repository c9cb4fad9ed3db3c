"""How processes become ranks: before any process group exists they tell each other what they are, and one of them judges.

Ranks whose backends, devices, timeouts or versions differ cannot even make a process group together: torch waits, or aborts.
So they meet in the key-value store from which the groups are made, where every rank can be told the same.

    rank r   rank/r  = what it is, or why it cannot join        plain JSON; each writes a nonce of its own with it
    rank 0   verdict = a place and a device for each rank, or the one error of all, with the nonces that it was made of
    rank r   ack/r   = the verdict's name, once it has its own nonce
    rank 0   verdict = the same, final, when all have answered

A launcher's store outlives the processes that it starts again: what an earlier one wrote is there when the next one comes. A
nonce tells them apart; where rank 0 has judged by an earlier one's words, it judges anew when the next one has spoken. The form
of what is said does not change, so that ranks of different versions understand that they are. Nothing here calls
torch.distributed.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any, Protocol

import torch

from .. import version
from ..config.agreement import SAME_EVERYWHERE, VERSIONS, differences, disagreement, of_any_version, ranks_said
from ..config.environment import RankEnvironment, torch_debug
from ..errors import ConfigError, RankError, ShardwiseError

logger = logging.getLogger("shardwise")

_SAY_WHO_IS_MISSING_AFTER_S = 30.0
_LET_THE_OTHERS_READ_S = 10.0


class Store(Protocol):
    """What of torch's key-value stores is used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


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
    def read(cls, said: Mapping[str, Any]) -> Introduction:
        """From what another rank said; of another version's, what is known here."""
        return cls(**{"facts": {}, "host": "", **of_any_version(cls, said)})


@dataclass(frozen=True)
class Verdict:
    """What follows for every rank.

    places:  by rank. machines: by rank, the number of its machine, from 0 in the order of the ranks.
    problem: a ConfigError's text, for every rank.
    failed:  a rank that met an error of its own, with its words; late: ranks that did not come.
    """

    places: list[Place] = field(default_factory=list)
    problem: str | None = None
    failed: tuple[int, str] | None = None
    late: str | None = None
    machines: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Verdict:
        return cls(**of_any_version(cls, said))

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
    number = {host: index for index, host in enumerate(by_host)}
    return Verdict(places, machines=[number[one.host] for one in said])


def device_index(local_rank: int, gpus: Sequence[str] | None) -> int | None:
    """The CUDA device of a rank: that of its number, or the only one that it sees, where a scheduler gives each its own."""
    if gpus is None:
        return None
    return local_rank if local_rank < len(gpus) else 0 if len(gpus) == 1 else None


def meet(
    store: Store, rank: int, world_size: int, mine: Introduction, *, timeout_s: float, problem: Exception | None = None
) -> tuple[str, Verdict]:
    """Tell the other ranks what this one is; the name of this meeting, the same on every rank, and its verdict. Collective.

    problem: what keeps this rank from joining; the others are told and do not wait for it.
    """
    nonce = uuid.uuid4().hex
    said = asdict(mine) if problem is None else {"error": f"{type(problem).__name__}: {problem}"}
    text = json.dumps({**said, "nonce": nonce})
    if rank == 0:
        return _Chair(store, world_size, text, timeout_s).decide()
    try:
        return _hear(
            store, rank, world_size, text, nonce, 2 * timeout_s
        )  # rank 0 may come later, and then waits as long
    except RuntimeError as error:
        if isinstance(error, ShardwiseError):
            raise
        raise RankError(not_here([0], 2 * timeout_s)) from error  # torch's: the store has ended with rank 0


def _hear(store: Store, rank: int, world_size: int, text: str, nonce: str, timeout_s: float) -> tuple[str, Verdict]:
    """Say `text`, and wait for the verdict that counts this process in: an earlier one's may still be there."""
    store.set(f"rank/{rank}", text)
    problem: ConfigError | None = None
    answered = ""
    for _ in _polls(timeout_s, world_size):
        said = json.loads(store.get("verdict")) if store.check(["verdict"]) else {"nonces": {}}
        if said["nonces"].get(str(rank)) == nonce:
            if answered != said["name"]:
                answered = said["name"]
                store.set(f"ack/{rank}", answered)
            if said["final"] and problem is not None:
                raise problem
            if said["final"]:
                return answered, Verdict.read(said)
        last = json.loads(store.get(f"rank/{rank}"))
        if last["nonce"] != nonce:
            problem = ConfigError(
                f"RANK {rank} was given to two processes. Each needs a number of its own, from 0 to {world_size - 1}."
            )
            if "error" in last:  # the other one tells the rest
                raise problem
            store.set(f"rank/{rank}", json.dumps({"nonce": nonce, "error": f"ConfigError: {problem}"}))
    raise RankError(not_here([0], timeout_s))


def _polls(timeout_s: float, world_size: int) -> Iterator[float]:
    """The seconds that have passed, again and again until the time is up; ever more slowly, as many ask one store."""
    began, pause = time.monotonic(), 0.001
    while (passed := time.monotonic() - began) < timeout_s:
        yield passed
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05 + world_size / 5000)


class _Chair:
    """Rank 0's part: it reads what all say until it can judge, and waits until all have heard."""

    def __init__(self, store: Store, world_size: int, own: str, timeout_s: float) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._others = range(1, world_size)
        self._said: dict[int, str] = {0: own}
        self._name: str | None = None
        self._heard: set[int] = set()

    def decide(self) -> tuple[str, Verdict]:
        told = False
        for passed in _polls(self._timeout_s, len(self._others)):
            news = self._read()
            verdict = self._judged()
            if verdict is not None and verdict.failed is not None:
                return self._part(verdict)
            if verdict is not None and (news or self._name is None):
                self._publish(verdict)
            if verdict is not None and self._all_hear(self._others):
                return (
                    self._part(verdict)
                    if verdict.problem is not None
                    else (self._publish(verdict, final=True), verdict)
                )
            if passed > _SAY_WHO_IS_MISSING_AFTER_S and not told:
                logger.warning("Waiting for %s to join the run.", ranks_said(self._missing()))
                told = True
        return self._part(Verdict(late=not_here(self._missing(), self._timeout_s)))

    def _read(self) -> bool:
        """Whether a rank has come, or its successor."""
        news = False
        for rank in self._others:
            if rank not in self._heard and self._store.check([f"rank/{rank}"]):
                text = self._store.get(f"rank/{rank}").decode()
                news |= self._said.get(rank) != text
                self._said[rank] = text
        return news

    def _judged(self) -> Verdict | None:
        """None while ranks are missing and none has failed."""
        said = {rank: json.loads(self._said[rank]) for rank in sorted(self._said)}
        failed = next(((rank, values["error"]) for rank, values in said.items() if "error" in values), None)
        if failed is not None:
            return Verdict(failed=failed)
        return judge([Introduction.read(values) for values in said.values()]) if len(said) > len(self._others) else None

    def _publish(self, verdict: Verdict, *, final: bool = False, only: int | None = None) -> str:
        """Tell it to all that have come, or to one of them. Gives its name."""
        self._name = uuid.uuid4().hex
        self._heard.clear()
        nonces = {str(rank): json.loads(text)["nonce"] for rank, text in self._said.items() if only in (None, rank)}
        self._store.set(
            "verdict", json.dumps({**asdict(verdict), "name": self._name, "final": final, "nonces": nonces})
        )
        return self._name

    def _all_hear(self, ranks: Iterable[int]) -> bool:
        """Whether these have the last verdict."""
        for rank in ranks:
            if rank in self._heard or not self._store.check([f"ack/{rank}"]):
                continue
            if self._store.get(f"ack/{rank}").decode() == self._name:
                self._heard.add(rank)
        return self._heard >= set(ranks)

    def _missing(self) -> list[int]:
        """Who has not come; once all have said something, whose answer is not there: an earlier process may have said it."""
        return [rank for rank in self._others if rank not in (self._said if self._name is None else self._heard)]

    def _part(self, verdict: Verdict) -> tuple[str, Verdict]:
        """The run ends here. The store may end with this process: it stays for those who have come or soon will."""
        failing = 0 if verdict.failed is None else verdict.failed[0]
        if failing and not self._is_real(verdict, failing):
            self._name = None
            return self.decide()
        name, left = self._publish(verdict, final=True), set[int]()
        for _ in _polls(_LET_THE_OTHERS_READ_S, len(self._others)):
            if self._read():
                left |= self._heard
                name = self._publish(verdict, final=True)
            coming = self._others if verdict.failed is not None else self._said
            if self._all_hear(set(coming) - left - {0}):
                break
        return name, verdict

    def _is_real(self, verdict: Verdict, failing: int) -> bool:
        """Whether the rank that failed is there, and it was not an earlier process whose successor is on its way."""
        self._publish(verdict, only=failing)
        said = self._said[failing]
        for _ in _polls(_LET_THE_OTHERS_READ_S, len(self._others)):
            self._read()
            if self._said[failing] != said:
                return False
            if self._all_hear([failing]):
                break
        return True


def not_here(ranks: Sequence[int], timeout_s: float) -> str:
    """Who has not come, and why that may be."""
    return (
        f"{ranks_said(ranks)} did not join the run within {timeout_s:g} s. Perhaps it has ended, was never started, runs "
        "another version of shardwise, or its script makes no Accelerator. A slow start needs a larger collective_timeout_s."
    )


def missed(where: str, timeout: timedelta, error: BaseException) -> RankError:
    """For an error of torch's in a message that all ranks send at `where`: one has not come in time, or is gone."""
    within = f"{timeout.total_seconds():g} s"
    return RankError(f"not every rank came to {where} within {within}, or one has ended: {error}")
