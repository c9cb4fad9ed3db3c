"""An optimizer's states at one glance, for who wants to know whether they lie where they lay, and how far they have counted.

`OptimizerState.intervals` says where each state is, which takes some 20 us for each interval; this takes 2. What it gives as
witnesses are the objects in which elementwise states rest: as long as they are the same, so are the intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..offload.store import Slab
from .optimizer_state import OptimizerState
from .resting import OFFLOADED
from .visits import Shard
from .wholes import Whole


@dataclass
class Sighting:
    """What an optimizer holds on this rank, interval by interval.

    witnesses: of each interval what the optimizer holds, and what its elementwise states rest in, in the order of `names`.
    names:     of each interval its elementwise states; None where it has taken no step.
    counts:    name -> (which, value) of what is a number: a tensor without dimensions, or Python's; counted among the intervals
               that have taken a step.
    is_plain:  it has nothing else, so that the intervals are `names`. Else only `OptimizerState.intervals` knows.
    groups:    of each parameter group, ids of what is in it.
    """

    witnesses: list[object] = field(default_factory=list)
    names: list[tuple[str, ...] | None] = field(default_factory=list)
    counts: dict[str, tuple[list[int], list[Any]]] = field(default_factory=dict)
    is_plain: bool = True
    groups: list[list[int]] = field(default_factory=list)


def sight(states: OptimizerState) -> Sighting:
    """The states as they are now. No communication, and no question to the device."""
    found = Sighting(groups=[[id(one) for one in group["params"]] for group in states.optimizer.param_groups])
    of, plain = states.optimizer.state, (bool, int, float)
    place = -1
    held: list[Shard | Whole] = [*states.groups.stepped, *states.groups.owned]
    for shard in held:
        found.witnesses.append(shard.tensor)
        state = of.get(shard.tensor)
        if not state:
            found.names.append(None)
            continue
        place += 1
        slabs: dict[str, Slab] = shard.states
        names = []
        dimensions = shard.tensor.ndim
        for name, value in state.items():
            is_tensor = isinstance(value, Tensor)
            if name in slabs and (is_tensor or value is OFFLOADED):
                found.witnesses.append(slabs[name])
                names.append(name)
            elif is_tensor and value.ndim:
                found.witnesses.append(value)
                names.append(name)
            elif (is_tensor and not value.is_complex() and dimensions) or type(value) in plain:
                places, values = found.counts.setdefault(name, ([], []))
                places.append(place)
                values.append(value)
            else:
                found.is_plain = False
        found.names.append(tuple(names))
    return found


def read_at_once(values: Sequence[Any]) -> Tensor | None:
    """Values of one kind as one tensor where they are tensors without dimensions, on their device; None if they are not."""
    first = values[0]
    if not isinstance(first, Tensor):
        return None
    alike = all(
        isinstance(one, Tensor) and one.dtype == first.dtype and one.device == first.device and type(one) is type(first)
        for one in values
    )
    return torch.stack(list(values)) if alike else None
