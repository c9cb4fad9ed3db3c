"""Names, shapes and offsets of a flat buffer, and which interval of it each rank keeps. Pure arithmetic.

A buffer holds its tensors one after another, each at an offset that is a multiple of the alignment, and is padded so that
every rank's interval has the same size. With 2 ranks, alignment 4, and tensors a (3 elements), b (6), c (2):

    element   0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15
              a   a   a   .   b   b   b   b   b   b   .   .   c   c   .   .
              |------------ rank 0 ------------|------------ rank 1 -----------|

A tensor may lie in several intervals: rank 0 keeps b[0:4], rank 1 keeps b[4:6]. An element is a byte for frozen weights,
which are never computed with in flat form, and a number for trainable ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ..errors import LayoutError

# Bytes. The widest vector load and the tile alignment of the matrix units are met by it, whatever the dtype.
ALIGNMENT = 128


@dataclass(frozen=True)
class Slot:
    """One tensor's place: `numel` elements from `offset`, both in the buffer's elements; `shape` as the tensor has it."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclass(frozen=True)
class Piece:
    """The part of a slot that lies in one rank's interval.

    slot:     index of the slot.
    in_slot:  where the part begins, counted from the tensor's first element.
    in_shard: where it begins in the rank's shard.
    """

    slot: int
    in_slot: int
    in_shard: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """slots in buffer order; numel of the whole buffer, padding included; world_size intervals of shard_numel each."""

    slots: tuple[Slot, ...]
    numel: int
    world_size: int

    @classmethod
    def pack(
        cls, tensors: Iterable[tuple[str, tuple[int, ...], int]], world_size: int, alignment: int, parts: int = 1
    ) -> Layout:
        """Place tensors one after another.

        tensors:   (name, shape, elements), in order; elements may be bytes.
        alignment: in elements; every offset and the size of a shard's part are multiples of it. parts: of a shard.
        Raises LayoutError for a tensor without elements, or no tensor at all.
        """
        slots = []
        end = 0
        for name, shape, numel in tensors:
            if numel <= 0:
                raise LayoutError(f"{name} has no elements: it cannot be placed in a flat buffer.")
            slots.append(Slot(name, shape, end, numel))
            end = _round_up(end + numel, alignment)
        if not slots:
            raise LayoutError("a flat buffer needs at least one tensor.")
        return cls(tuple(slots), _round_up(end, alignment * world_size * parts), world_size)

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    def cut(self, parts: int) -> Layout:
        """The same buffer with each rank's interval cut into so many, in order. `shard_numel` must be a multiple of `parts`."""
        return Layout(self.slots, self.numel, self.world_size * parts)

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The parts of slots in rank's interval, in order. Padding belongs to no piece."""
        begin, end = rank * self.shard_numel, (rank + 1) * self.shard_numel
        found = []
        for index, slot in enumerate(self.slots):
            first, last = max(begin, slot.offset), min(end, slot.offset + slot.numel)
            if first < last:
                found.append(Piece(index, first - slot.offset, first - begin, last - first))
        return tuple(found)


@dataclass(frozen=True)
class Region:
    """The part of a whole flat tensor on which one rank works: its interval, or all of it where `rank` is None.

    parts: into how many each shard of `layout` is cut, one for each of the ranks that hold it; `rank` counts these parts.
    """

    layout: Layout
    rank: int | None
    parts: int = 1

    @property
    def numel(self) -> int:
        return self.layout.numel if self.rank is None else self.layout.shard_numel // self.parts

    @property
    def interval(self) -> slice:
        """Of a tensor of (layout.numel,)."""
        begin = 0 if self.rank is None else self.rank * self.numel
        return slice(begin, begin + self.numel)

    @property
    def in_shard(self) -> slice:
        """The same, of the shard of (layout.shard_numel,) in which it lies."""
        begin = 0 if self.rank is None else self.rank % self.parts * self.numel
        return slice(begin, begin + self.numel)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The parts of slots that lie in it, in order; `in_shard` of a piece counts from where it begins."""
        if self.rank is not None:
            return self.layout.cut(self.parts).pieces(self.rank)
        return tuple(Piece(i, 0, slot.offset, slot.numel) for i, slot in enumerate(self.layout.slots))


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
