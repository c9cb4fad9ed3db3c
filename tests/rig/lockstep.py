"""Ranks without processes: a schedule for each, in one process, on units that have no memory.

Each rank is a thread, but only one of them runs at a time, until it waits in a collective; who goes on then is picked by the
test. So an order of arrival is a list of numbers, the same at every run, and a wait that nobody ends is seen at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

from shardwise.zero.engine import ReductionsInFlight
from shardwise.zero.schedule import Schedule
from shardwise.zero.unit import Unit, Weights

T = TypeVar("T")
Pick = Callable[[Sequence[int]], int]  # of the ranks that can go on, the one that does


class StuckError(AssertionError):
    """Ranks wait for each other for ever, or come to different collectives."""


class Lockstep:
    """The ranks of one run. pick: see `Pick`. blocking: a gather holds the host until all have come, as with gloo."""

    def __init__(self, count: int, pick: Pick, *, blocking: bool = True) -> None:
        self.count = count
        self.blocking = blocking
        self.sent: list[list[Any]] = [[] for _ in range(count)]  # by each rank, in order: gathers and messages
        self.rounded: list[bool] = []  # in the order of gathers, whether it is of codes: on every rank, or StuckError
        self._pick = pick
        self._said: dict[tuple[str, int], dict[int, Any]] = {}  # by group and place: what each rank came with
        self._names: dict[tuple[str, int], Any] = {}
        self._places = [{"gather": 0, "message": 0} for _ in range(count)]
        self._batons = [threading.Semaphore(0) for _ in range(count)]
        self._over = threading.Semaphore(0)
        self._ready = set(range(count))
        self._running = set(range(count))
        self._error: BaseException | None = None

    def run(self, play: Callable[[FakeRanks], T]) -> list[T]:
        """What `play` gives on each rank. Raises the first error of one, or StuckError."""
        found: list[Any] = [None] * self.count

        def body(rank: int) -> None:
            self._batons[rank].acquire()
            try:
                if self._error is None:
                    found[rank] = play(FakeRanks(self, rank))
            except BaseException as error:
                self._error = self._error or error
            self._running.discard(rank)
            self._ready.discard(rank)
            self._hand_on()

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        self._hand_on()
        self._over.acquire()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return found

    def meet(self, rank: int, group: str, what: Any, value: Any, *, waits: bool = True) -> list[Any]:
        """Come to a collective: what each rank came with. waits: until all have."""
        key = (group, self._places[rank][group])
        self._places[rank][group] += 1
        self.sent[rank].append((group, what))
        if self._names.setdefault(key, what) != what:
            raise StuckError(f"rank {rank} comes to {what} where another came to {self._names[key]} (number {key[1]})")
        said = self._said.setdefault(key, {})
        said[rank] = value
        if not waits:
            return []
        if len(said) == self.count:
            self._ready |= said.keys()
        else:
            self._ready.discard(rank)
        self._hand_on(rank)
        return [said[other] for other in range(self.count)]

    def _hand_on(self, rank: int | None = None) -> None:
        """Let another rank run; return when it is this one's turn again."""
        if not self._running:
            self._over.release()
            return
        if not self._ready and self._error is None:
            self._error = StuckError(f"ranks {sorted(self._running)} wait for ever; sent: {self.sent}")
        if self._error is not None:  # each ends in turn
            following = min(self._running)
        else:
            following = self._pick(sorted(self._ready))
        if following != rank:
            self._batons[following].release()
            if rank is not None:
                self._batons[rank].acquire()
        if rank is not None and self._error is not None:
            raise self._error


class FakeRanks:
    """One rank's end of a `Lockstep`, with the collectives that a schedule uses."""

    def __init__(self, steps: Lockstep, rank: int) -> None:
        self._steps = steps
        self.rank = rank
        self.world_size = steps.count
        self.shards = self  # all of them hold one copy together
        self.blocking = steps.blocking
        self.lost = None
        self.gathers = 0

    @property
    def rounded(self) -> list[bool]:
        """Of this rank's gathers so far, in order: whether each was of codes."""
        return self._steps.rounded[: self.gathers]

    @property
    def sent(self) -> list[Any]:
        return self._steps.sent[self.rank]

    def gather_numbers(self, number: int) -> list[int]:
        return self._steps.meet(self.rank, "message", "numbers", number)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._steps.meet(self.rank, "message", "objects", value)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        said = self._steps.meet(self.rank, "message", f"{len(flags)} flags", list(flags))
        return [any(column) for column in zip(*said, strict=True)]

    def broadcast_object(self, value: Any) -> Any:
        return self._steps.meet(self.rank, "message", "broadcast", value)[0]

    def agree(self, error: BaseException | None) -> None:
        self._steps.meet(self.rank, "message", "agree", error)

    def all_gather_together(self, wholes: Sequence[str], shards: Sequence[str], *, rounded: bool = False) -> None:
        if self.gathers == len(self._steps.rounded):
            self._steps.rounded.append(rounded)
        if self._steps.rounded[self.gathers] != rounded:
            raise StuckError(f"the gather of {wholes} is of codes on some ranks and exact on others")
        self.gathers += 1
        self._steps.meet(self.rank, "gather", tuple(wholes), None, waits=self.blocking)


class FakeLane:
    def on(self) -> Any:
        return nullcontext()

    def mark(self) -> None: ...

    def wait(self, event: object) -> None: ...


class FakeLanes:
    def __init__(self) -> None:
        self.gather = self.reduce = self.up = self.down = FakeLane()

    def mark_compute(self) -> None: ...

    def compute_waits(self, event: object) -> None: ...

    def join(self) -> None: ...


class FakeGuard:
    """touched: a script has written a weight; here none does."""

    touched = False

    def __init__(self) -> None:
        self.is_open = False

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


class FakeBuffer:
    """The weights of a unit. travels: their shard rests on another tier. has_peers: it is read from the others' memory."""

    leaves = True
    has_moved = False
    slab = None
    whole_nbytes = 1
    packing = "as codes in passes"

    def __init__(self, name: str, *, travels: bool, has_peers: bool) -> None:
        self.whole = self.shard = self.own_slice = name
        self.travels = travels
        self.has_peers = has_peers
        self.guard = FakeGuard()
        self.has_memory = False

    def expand(self) -> None:
        assert not self.has_memory
        self.has_memory = True

    def collapse(self) -> None:
        assert self.has_memory
        self.has_memory = False

    def copy_from_peers(self) -> None: ...

    def fix(self) -> None: ...

    def stay_whole(self) -> None: ...


class FakeUnit(Unit):
    """What comes as codes is told of."""

    def _gather_codes(self, parts: Sequence[Any], shards: Sequence[Any]) -> None:
        ranks: Any = self._engine.ranks
        ranks.all_gather_together([part.whole for part in parts], shards, rounded=True)

    def _fetched_again(self, parts: Sequence[Any]) -> list[Any]:
        return [part.shard for part in parts]


class _Units:
    """What fake units share."""

    def __init__(self, ranks: FakeRanks) -> None:
        self.ranks = ranks
        self.lanes = FakeLanes()

    def land(self, arrivals: object, waits: object) -> None: ...


def make_unit(name: str, shared: _Units | None = None, *, travels: bool = False, has_peers: bool = False) -> Unit:
    """A released unit, on a rank of its own if none is given."""
    buffer = FakeBuffer(name, travels=travels, has_peers=has_peers)
    shared = shared or _Units(FakeRanks(Lockstep(1, lambda ready: ready[0], blocking=False), 0))
    unit = FakeUnit(name, [], cast(Any, None), cast(Any, shared), cast(Any, buffer), None)
    unit.state = Weights.RELEASED
    return unit


def make_schedule(
    ranks: FakeRanks, count: int, prefetch: int = 1, *, travels: bool = False, has_peers: bool = False
) -> Schedule:
    """The schedule of a rank over `count` units."""
    shared = _Units(ranks)
    units = [make_unit(f"unit {i}", shared, travels=travels, has_peers=has_peers) for i in range(count)]
    lanes: Any = shared.lanes
    return Schedule(units, cast(Any, ranks), lanes, ReductionsInFlight(lanes), prefetch)


def every_order(steps: int) -> Iterator[Pick]:
    """Picks that between them take every decision at the first `steps` places where there is one; the first rank later."""
    prefix: list[int] = []
    while True:
        decisions = _Decisions(steps, prefix)
        yield decisions.pick
        taken = decisions.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prefix = [which for which, _ in taken[:-1]] + [taken[-1][0] + 1]


class _Decisions:
    """Picks that follow `prefix`, and are the first rank behind it. taken: which of how many, at each of `steps` places."""

    def __init__(self, steps: int, prefix: Sequence[int]) -> None:
        self._steps = steps
        self._prefix = prefix
        self.taken: list[tuple[int, int]] = []

    def pick(self, ready: Sequence[int]) -> int:
        place = len(self.taken)
        if len(ready) == 1 or place == self._steps:
            return ready[0]
        which = self._prefix[place] if place < len(self._prefix) else 0
        self.taken.append((which, len(ready)))
        return ready[which]
