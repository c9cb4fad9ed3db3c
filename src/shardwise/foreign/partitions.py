"""Which elements of which weights lie where in a DeepSpeed rank's flat tensors: arithmetic on names and shapes.

A group is what DeepSpeed flattens together: a parameter group at stages 1 and 2, at stage 3 a part of one of at most
`sub_group_size` elements. Weights q (3, 2) and k (5,) on 2 ranks:

    stage 1, 2    rank 0 [ q q q q q q ]     rank 1 [ k k k k k . ]     one run of elements, padded at its end, in equal parts
    stage 3       rank 0 [ q q q k k k ]     rank 1 [ q q q k k . ]     each weight cut in equal parts, padded at its end
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# At stages 1 and 2 a partition's size is a multiple of this.
_ALIGNED = 2
# Name -> shape, in the order in which they lie.
Group = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stretch:
    """Elements [begin, begin + numel) of a weight, which are elements [at, at + numel) of a rank's flat tensor of a group."""

    name: str
    shape: tuple[int, ...]
    begin: int
    numel: int
    group: int
    at: int


@dataclass(frozen=True)
class Cut:
    """One rank's flat tensors. stretches: of all groups. used, full: elements of each group without and with padding."""

    stretches: tuple[Stretch, ...]
    used: tuple[int, ...]
    full: tuple[int, ...]


def cut_runs(groups: Sequence[Group], rank: int, world_size: int, alignment: Sequence[Sequence[int]]) -> Cut:
    """Rank `rank`'s part at stages 1 and 2. alignment: the padding behind each weight."""
    stretches: list[Stretch] = []
    used: list[int] = []
    full: list[int] = []
    for number, group in enumerate(groups):
        total = sum(math.prod(shape) for shape in group.values()) + sum(alignment[number])
        size = -(-total // (_ALIGNED * world_size)) * _ALIGNED
        low, high = rank * size, min((rank + 1) * size, total)
        start = 0
        for (name, shape), behind in zip(group.items(), alignment[number], strict=True):
            numel = math.prod(shape)
            first, last = max(low, start), min(high, start + numel)
            if first < last:
                stretches.append(Stretch(name, shape, first - start, last - first, number, first - low))
            start += numel + behind
        used.append(max(0, high - low))
        full.append(size)
    return Cut(tuple(stretches), tuple(used), tuple(full))


def cut_each(groups: Sequence[Group], rank: int, world_size: int) -> Cut:
    """Rank `rank`'s part at stage 3."""
    stretches: list[Stretch] = []
    full: list[int] = []
    for number, group in enumerate(groups):
        at = 0
        for name, shape in group.items():
            begin, numel = share_of(math.prod(shape), rank, world_size)
            if numel:
                stretches.append(Stretch(name, shape, begin, numel, number, at))
            at += share_size(math.prod(shape), world_size)
        full.append(at)
    return Cut(tuple(stretches), tuple(full), tuple(full))


def share_size(numel: int, world_size: int) -> int:
    """Elements of a weight's part at stage 3, padding included."""
    return -(-numel // world_size)


def share_of(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """(begin, numel) of a rank's part of a weight at stage 3, without padding."""
    size = share_size(numel, world_size)
    begin = min(rank * size, numel)
    return begin, min(size, numel - begin)
