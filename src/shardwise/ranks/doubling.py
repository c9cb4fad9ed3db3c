"""The messages of `control.py` as sends and receives between two ranks, in the hops of `hops.py`.

A message that ranks come to in another order, or with another number of flags, meets nobody, as with gloo's own: each carries
its number, kind and size in its tag, and the rank that waits says so when the time is over.

An interrupt does not part the ranks: what one has begun to exchange it exchanges to the end, and raises the interrupt then.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from itertools import accumulate, pairwise, starmap
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .control import Control, Ring
from .hops import Hop, heard_of, hops

# Up to so many ranks gloo's ring is at most as slow, also on cores that are shared.
FEW = 8

# What a rank says of its object, for all to hear: how long its pickle is, and the pickle itself if it is no longer than this.
_SLOT_NBYTES = 64
_LENGTH = struct.Struct("<q")
_MOST_INTERRUPTS = 20  # held back in one exchange: a handler that raises each time must not hold the process for ever


def control_over(group: dist.ProcessGroup, rank: int, world_size: int) -> Control:
    """The better way for so many ranks."""
    return (Ring if world_size <= FEW else Doubling)(group, rank, world_size)


class Kind(IntEnum):
    """Of messages, which meet their own alone."""

    FLAGS = 0
    NUMBERS = 1
    OBJECTS = 2
    REST = 3  # objects that do not fit into their slots


class Exchange:
    """One message of this rank, hop by hop.

    out, into: what each hop sends and receives. merge: called before the hop of a place sends, if it is not the first, and once
    more at the end: it makes of what was said and heard at the place before what is said at this one. It may run twice.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        route: Sequence[Hop],
        tag: int,
        out: Sequence[Tensor],
        into: Sequence[Tensor],
        merge: Callable[[int], None] | None = None,
    ) -> None:
        self._group = group
        self._merge = merge
        self._count = len(route)
        tags = range(tag, tag + self._count)
        self._sending = list(zip([[t] for t in out], [hop.to for hop in route], tags, strict=True))
        self._receiving = list(zip([[t] for t in into], [hop.source for hop in route], tags, strict=True))
        self._receives: list[dist.Work] = []
        self._sends: list[dist.Work] = []
        self._heard: list[bool] = []
        self._sent: list[bool] = []

    def run(self) -> None:
        """Send and receive all of it, or what is left of it."""
        _despite_interrupts(self.go_on)

    def tell(self) -> None:
        """Send all hops at once, for what is said does not depend on what is heard. `run` finishes it."""
        _despite_interrupts(self._tell)

    def ends_within(self, limit_s: float) -> bool:
        """Whether what was told comes to its end in that time; if it does not, the group is of no use any more."""
        works = [*self._receives[len(self._heard) :], *self._sends[len(self._sent) :]]
        try:
            return all(work.wait(timedelta(seconds=limit_s)) for work in works)
        except RuntimeError:
            return False

    # `extend` of such an iterator is one call for the interpreter: an interrupt comes before it or behind it, and how long the
    # lists are says which.

    def go_on(self) -> None:
        """As `run`, but an interrupt leaves it."""
        self._post()
        while (place := len(self._heard)) < self._count:
            if len(self._sends) == place:
                self._turn(place)
                self._send(place + 1)
            self._heard.extend(map(dist.Work.wait, self._receives[place : place + 1]))
        self._turn(self._count)
        self._sent.extend(map(dist.Work.wait, self._sends[len(self._sent) :]))

    def _tell(self) -> None:
        self._post()
        self._send(self._count)

    def _post(self) -> None:
        """Receive before anything is sent: a sender whose receiver is ready sends at once."""
        if not self._receives:
            self._receives.extend(starmap(self._group.recv, self._receiving))

    def _send(self, until: int) -> None:
        self._sends.extend(starmap(self._group.send, self._sending[len(self._sends) : until]))

    def _turn(self, place: int) -> None:
        if place and self._merge is not None:
            self._merge(place)


def _despite_interrupts(go_on: Callable[[], None]) -> None:
    """Run it to its end; then raise what has interrupted it. go_on: goes on where it was left."""
    interrupts: list[BaseException] = []
    while True:
        try:
            go_on()
        except RuntimeError:  # of the other ranks
            raise
        except BaseException as found:
            interrupts.append(found)
            if len(interrupts) < _MOST_INTERRUPTS:
                continue
        break
    if interrupts:
        raise interrupts[0]


class Doubling(Control):
    """Sends and receives. order: the ranks as this one hears of them."""

    def __init__(self, group: dist.ProcessGroup, rank: int, world_size: int) -> None:
        super().__init__(group, rank, world_size)
        self.order = heard_of(rank, world_size)
        self._hops = hops(rank, world_size)
        self._number = 0

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        count = len(flags)
        said = torch.tensor(flags, dtype=torch.uint8).repeat(len(self._hops) + 1, 1).unbind()
        heard = torch.empty(len(self._hops), count, dtype=torch.uint8).unbind()

        def merge(place: int) -> None:
            torch.maximum(said[place - 1], heard[place - 1], out=said[place])

        self._begin()
        vote = Exchange(self.group, self._hops, self._tag(Kind.FLAGS, count), said[:-1], heard, merge)
        if all(flags):
            self.told = vote
            vote.tell()
            return list(flags)
        vote.run()
        return [bool(flag) for flag in said[-1].tolist()]

    def gather_numbers(self, number: int) -> list[int]:
        known = torch.empty(self.world_size, dtype=torch.int64)
        known[0] = number
        self._begin()
        self.gathering(Kind.NUMBERS, known, range(self.world_size + 1)).run()
        return self._in_rank_order(known.tolist())

    def gather_objects(self, value: Any) -> list[Any]:
        """One of up to 56 bytes as a pickle takes as many hops as a number, a larger one of any rank twice as many."""
        pickled = pickle.dumps(value)
        self._begin()
        said = _Pickles(self, pickled)
        said.run()
        return [pickle.loads(text) for text in self._in_rank_order(said.heard())]

    def gathering(self, kind: Kind, known: Tensor, offsets: Sequence[int]) -> Exchange:
        """known: by rank in the order in which they are heard of, this one's first. offsets: where each begins, and the end."""
        out = [known[: offsets[hop.sent]] for hop in self._hops]
        into = [known[offsets[hop.known] : offsets[hop.known + hop.sent]] for hop in self._hops]
        return Exchange(self.group, self._hops, self._tag(kind), out, into)

    def _begin(self) -> None:
        self.hear_told()
        self._number += 1

    def _tag(self, kind: Kind, size: int = 0) -> int:
        """Of the first hop, 31 bits: number of the message 14, kind 2, size 10, hop 5."""
        return (self._number % 2**14) << 17 | kind << 15 | (size % 2**10) << 5

    def _in_rank_order(self, heard: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        for rank, value in zip(self.order, heard, strict=True):
            found[rank] = value
        return found


class _Pickles:
    """An object of every rank. They go round in slots of one size; if one does not fit, all go round once more, whole."""

    ROOM = _SLOT_NBYTES - _LENGTH.size

    def __init__(self, control: Doubling, mine: bytes) -> None:
        self._control = control
        self._mine = mine
        self._slots = bytearray(control.world_size * _SLOT_NBYTES)
        self._offsets = range(0, len(self._slots) + 1, _SLOT_NBYTES)
        self._slots[: _LENGTH.size] = _LENGTH.pack(len(mine))
        short = mine[: self.ROOM]
        self._slots[_LENGTH.size : _LENGTH.size + len(short)] = short
        self._first = control.gathering(Kind.OBJECTS, torch.frombuffer(self._slots, dtype=torch.uint8), self._offsets)
        self._whole = bytearray()
        self._places: list[int] = []
        self._second: Exchange | None = None

    def run(self) -> None:
        """As `Exchange.run`."""
        _despite_interrupts(self._go_on)

    def heard(self) -> list[bytearray]:
        """The pickles, in the order in which ranks are heard of."""
        if self._second is not None:
            return [self._whole[begin:end] for begin, end in pairwise(self._places)]
        return [self._slots[offset + _LENGTH.size : offset + _SLOT_NBYTES] for offset in self._offsets[:-1]]

    def _go_on(self) -> None:
        self._first.go_on()
        lengths = [_LENGTH.unpack_from(self._slots, offset)[0] for offset in self._offsets[:-1]]
        if max(lengths) > self.ROOM:
            if self._second is None:
                self._places = [0, *accumulate(lengths)]
                self._whole = bytearray(self._places[-1])
                self._whole[: len(self._mine)] = self._mine
                whole = torch.frombuffer(self._whole, dtype=torch.uint8)
                self._second = self._control.gathering(Kind.REST, whole, self._places)
            self._second.go_on()
