"""Small facts between host processes, over a process group of gloo that moves nothing else: the control group.

These messages are some bytes, and the hosts wait for them at the end of a pass, so how often they are handed on is what they
cost. gloo's own all_gather and all_reduce go round a ring (`Ring`). Sends and receives between two ranks (`doubling.py`), in
ceil(log2(ranks)) hops, do better from some ranks on:

    ranks                        2     4     8    64    1,024   16,384
    hops of gloo's all_reduce    2     6    14   126    2,046   32,766
    of gloo's all_gather         1     3     7    63    1,023   16,383
    of sends and receives        1     2     3     6       10       14

Few ranks keep the ring. Where processes outnumber cores a send of ours takes longer than one of gloo's hops: gloo's thread
spins on a connection while the thread that holds it waits for a core (docs/log.md, 2026-11-29).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .group import all_gather_flat


class Vote(Protocol):
    """One that is under way, because this rank knew its outcome and did not wait for the others."""

    def run(self) -> None:
        """Return once all have heard it."""

    def ends_within(self, limit_s: float) -> bool:
        """Whether all hear it in that time. If not, the group is of no use any more."""


class Control(ABC):
    """This rank's end of the control group. Every method is collective, in the same order on all ranks.

    group: of gloo, over all ranks of the run. told: a vote under way.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, world_size: int) -> None:
        self.group = group
        self.rank = rank
        self.world_size = world_size
        self.told: Vote | None = None

    @abstractmethod
    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """See `Ranks.any_of`. flags: at least one."""

    @abstractmethod
    def gather_numbers(self, number: int) -> list[int]:
        """Every rank's whole number of 64 bits, in rank order."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order."""

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.any_of([False])

    def broadcast_object(self, value: Any, source: int) -> Any:
        """Rank `source`'s `value`. gloo sends it along a tree."""
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def let_go(self) -> tuple[dist.ProcessGroup, Vote | None]:
        """The group, and a vote under way in it, for `leaving` alone."""
        told, self.told = self.told, None
        return self.group, told

    def hear_told(self) -> None:
        """Before another message: all have heard what this rank told without waiting."""
        if self.told is not None:
            self.told.run()
            self.told = None


class Ring(Control):
    """gloo's own collectives."""

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        self.hear_told()
        votes = torch.tensor(flags, dtype=torch.uint8)
        sent = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert sent is not None
        if all(flags):
            self.told = _Reduced(sent)
            return list(flags)
        sent.wait()
        return [bool(vote) for vote in votes.tolist()]

    def gather_numbers(self, number: int) -> list[int]:
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        all_gather_flat(numbers, torch.tensor([number]), group=self.group)
        return [int(n) for n in numbers]

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class _Reduced:
    """A vote of gloo's own."""

    def __init__(self, sent: dist.Work) -> None:
        self._sent = sent

    def run(self) -> None:
        self._sent.wait()

    def ends_within(self, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not self._sent.is_completed():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        return True
