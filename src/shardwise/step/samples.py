"""Which of a group's parameters have a stand-in in a trial, and how small that is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def chosen(parameters: Sequence[Tensor], own: Callable[[Tensor], Any]) -> list[Tensor]:
    """For each number of dimensions the first parameter, and the largest of the others; and those for each kind of `own`.

    own: what is set for a parameter alone.
    """
    alike = defaultdict[Any, list[Tensor]](list)
    for parameter in parameters:
        if parameter.numel():
            alike[parameter.ndim, own(parameter)].append(parameter)
    found = []
    for same in alike.values():
        found += same[:1]
        if len(same) > 1:
            found.append(max(same[1:], key=lambda p: p.numel()))
    return sorted(found, key=lambda p: p.ndim)


def small(shape: tuple[int, ...], room: int) -> tuple[int, ...]:
    """`shape` with its largest dimensions cut down to at most `room` elements."""
    limit = max(shape, default=1)
    while math.prod(min(n, limit) for n in shape) > room:
        limit -= max(1, limit // 16)
    return tuple(min(n, limit) for n in shape)
