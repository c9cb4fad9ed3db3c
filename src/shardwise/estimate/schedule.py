"""The engine's schedule of one step as arithmetic: what the computation waits for, and what runs beside it.

A gather starts with the computation of the unit `prefetch` places before, one after another on a lane of their own; what it
needs from the host is fetched one unit earlier. Reductions follow their unit's backward, and what leaves for the host follows
them.
What the computation waits for is exposed; what it does not wait for slows it by a measured share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..step.publishing import GROUP_NBYTES
from .collectives import all_reduce_s, collective_s, gather_s, over_copies_s
from .terms import Terms


@dataclass(frozen=True)
class Work:
    """One unit in one pass. seconds: of computation. gathered, reduced: bytes of the whole unit, 0 for none.

    fetch_s: in which this rank's shard comes from where it rests. land_s: in which its gradient goes there.
    """

    seconds: float
    gathered: int
    reduced: int = 0
    fetch_s: float = 0.0
    land_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a step takes, in seconds; `total` is the sum."""

    compute: float
    exposed_gathers: float
    slowed: float
    exposed_reductions: float
    optimizer: float

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


def step_of(
    passes: Sequence[Work],
    turn: int,
    ranks: int,
    trained: int,
    terms: Terms,
    prefetch: int = 1,
    group: int | None = None,
    codes: bool = False,
    apart: bool = False,
    all_own: bool = False,
) -> Step:
    """The engine's schedule of one step with AdamW on the device. The arguments are those of `walk`.

    trained: elements that the optimizer steps, over all ranks.
    """
    step = walk(passes, turn, ranks, terms, prefetch, group=group, codes=codes, apart=apart, all_own=all_own)
    shards = ranks if group is None else group
    # Masters, two moments and a gradient in fp32: 16 bytes read, 12 and a 16-bit copy written.
    optimizer = 30 * trained / (ranks if all_own else shards) / terms.memory
    if all_own:
        optimizer += published_over_copies_s(trained, shards, ranks, terms)
    return replace(step, optimizer=optimizer)


def published_over_copies_s(trained: int, shards: int, ranks: int, terms: Terms) -> float:
    """Seconds in which new 16-bit weights cross to the other copies (hpZ); weights that stay whole take little more."""
    gathers = math.ceil(2 * trained / GROUP_NBYTES)
    return gathers * over_copies_s(2 * trained // gathers, shards, ranks, terms) if gathers else 0.0


def walk(
    passes: Sequence[Work],
    turn: int,
    ranks: int,
    terms: Terms,
    prefetch: int = 1,
    *,
    group: int | None = None,
    codes: bool = False,
    apart: bool = False,
    all_own: bool = False,
) -> Step:
    """One forward and its backward, without the optimizer.

    passes: forward and backward, in order. turn: where the backward begins; the 1 + prefetch units before it stay gathered.
    group: how many ranks hold one copy together; None: all. codes: see `gather_s`.
    all_own: all ranks divide what the optimizer works on, and a group the weights alone (hpZ).
    apart: the all-reduce over copies beside the next unit's reduction, which the engine does not do.
    """
    shards = ranks if group is None else group
    # Copy engines reach the memory of one machine alone.
    engines = None if shards > terms.per_machine else terms.engines
    of_gathers = terms if engines is None else replace(terms, nvlink=engines)
    now = lane = up = reduced_until = crossed_until = landed_until = exposed = slowed = 0.0
    fetched: list[float] = []
    ready: list[float] = []
    for place, work in enumerate(passes):
        while len(fetched) <= min(place + prefetch + 1, len(passes) - 1):  # one unit before its gather
            at = len(fetched)
            up = up if turn <= at <= turn + prefetch else max(up, now) + passes[at].fetch_s
            fetched.append(up)
        while len(ready) <= min(place + prefetch, len(passes) - 1):  # issued when this unit's turn comes
            at = len(ready)
            stays = turn <= at <= turn + prefetch
            taken = 0.0 if stays else gather_s(passes[at].gathered, shards, of_gathers, codes=codes)
            lane = max(lane, now, 0.0 if stays else fetched[at]) + taken
            ready.append(lane)
            slowed += terms.slowing * taken if at else 0.0
        waits = max(0.0, ready[place] - now)
        exposed += waits
        now += waits + work.seconds
        if work.reduced and ranks > 1:
            reduced_until = max(reduced_until, now) + collective_s(work.reduced, shards, terms)
            cross = over_copies_s if all_own else all_reduce_s
            crossed_until = max(crossed_until, reduced_until) + cross(work.reduced, shards, ranks, terms)
            reduced_until = reduced_until if apart else crossed_until
        landed_until = max(landed_until, reduced_until, now) + work.land_s if work.land_s else landed_until
    end = max(reduced_until, crossed_until, landed_until)
    return Step(sum(work.seconds for work in passes), exposed, slowed, max(0.0, end - now), 0.0)
