"""Which weights stay gathered while a model generates: as many units as the memory budget allows.

All of them, and then there is nothing that the ranks have to agree on inside; or the first ones in the order of a forward, and
the others come and go (`rounds.py`). The sizes are the same on all ranks, so all keep the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ..ranks.ranks import Ranks
from .budget import Budget
from .schedule import Schedule
from .unit import Unit


def units_that_fit(
    sizes: Sequence[int], order: Sequence[int], pinned: Iterable[int], window: int, room: int
) -> list[int]:
    """The units that stay gathered within `room` bytes: all of `order`, or the first ones.

    sizes:  bytes of each unit, by index. pinned: stay in any case. window: units that come and go at one time.
    """
    if sum(sizes[i] for i in order) <= room:
        return list(order)
    kept = list(dict.fromkeys(pinned))
    rest = [i for i in order if i not in kept]
    room -= sum(sizes[i] for i in kept) + window * max((sizes[i] for i in rest), default=0)
    for i in rest:
        room -= sizes[i]
        if room < 0:
            break
        kept.append(i)
    return kept


def in_forward_order(units: Sequence[Unit], schedule: Schedule) -> list[Unit]:
    """`units` as the next forward will need them, as far as that is known; those without modules last."""
    place = {i: n for n, i in reversed(list(enumerate(schedule.forward_sequence)))}
    last = len(schedule.units)
    return sorted(units, key=lambda unit: place.get(schedule.index[id(unit)], last))


def units_to_keep(schedule: Schedule, ranks: Ranks, budget: int | str | None, pinned: Collection[int]) -> list[int]:
    """The units that stay gathered while the model generates, on the rank with the least room. Collective.

    budget: bytes, "auto" for what is free, None for as few as possible. pinned: ids of parameters whose units stay in any case.
    """
    room = min(ranks.gather_numbers(Budget(ranks.device, budget).for_generation()))
    units = schedule.units
    order = [schedule.index[id(u)] for u in in_forward_order([u for u in units if u.leaves], schedule)]
    here = [i for i in order if any(id(m.parameter) in pinned for part in units[i].parts for m in part.members)]
    sizes = [sum(part.whole_nbytes for part in unit.parts) for unit in units]
    # The one in use, those ahead of it, and one on its way from another tier.
    window = 1 + schedule.prefetch + any(unit.travels for unit in units)
    return units_that_fit(sizes, order, here, window, room)
