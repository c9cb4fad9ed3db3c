"""What this rank holds of a run's tensors, as intervals of named parameters: the engine's side of a checkpoint.

A checkpoint must not know how masters, frozen weights and optimizer states rest. Here each is a list of intervals, whatever
the stage, the tier and the number of ranks:

    trained/q.lora_A [0, 4096)        the fp32 master                       one per parameter that is trained
    frozen/q.weight [65536, 131072)   in the dtype that it computes in
    exp_avg/q.lora_A [0, 4096)        an optimizer's state of that parameter, see optimizer_state.py

`read` gives a copy on the CPU and `write` takes one; nothing else of the engine shows. Where several ranks hold the same (all
what is whole, those of `ranks.copies` a frozen shard, those of `ranks.alike` a master and its states), `share` cuts the list
so that the ranks together have each element once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..offload.store import Slab
from ..plan.plan import Tier
from ..ranks.ranks import Ranks
from ..zero.sharded import ShardedModel
from ..zero.trained import Trained
from . import publishing

# Numbers of elements at which `share` may cut: bytes stay in words of 8, whatever the dtype.
_CUT = 64


@dataclass(frozen=True)
class Rest:
    """Elements of a contiguous buffer from `begin` on, in memory or in a slab.

    dtype:    what its bytes are, where it is of bytes. visits: it is a slab in memory that nothing but `put` and `write_part`
              changes, because it visits the device for a step.
    """

    flat: Tensor | Slab
    begin: int
    dtype: torch.dtype | None = None
    visits: bool = False

    def range(self, first: int, numel: int) -> tuple[int, int]:
        """(begin, count) in elements of the buffer, of `numel` elements from `first` on."""
        size = 1 if self.dtype is None else self.dtype.itemsize
        return self.begin + first * size, numel * size

    def look(self, first: int, numel: int) -> Tensor:
        return seen(self.flat, *self.range(first, numel), self.dtype)

    @torch.no_grad()
    def write(self, first: int, values: Tensor) -> None:
        begin, _ = self.range(first, values.numel())
        if not isinstance(self.flat, Slab):
            self.look(first, values.numel()).copy_(values)
            return
        if self.dtype is not None:
            values = values.to(self.dtype).contiguous().view(torch.uint8)
        self.flat.write_part(begin, values)


def seen(flat: Tensor | Slab, begin: int, count: int, dtype: torch.dtype | None) -> Tensor:
    """Elements [begin, begin + count) of a buffer where they rest, or a copy of what rests on a drive; see `Rest`."""
    if isinstance(flat, Slab):
        found = flat.read_part(begin, count)
    else:
        found = flat.detach().view(-1)[begin : begin + count]
    return found if dtype is None else found.view(dtype)


@dataclass(frozen=True)
class Interval:
    """Elements [begin, begin + numel) of one parameter in one role, on this rank.

    name:   the parameter's name in its model; shape: the whole parameter's.
    dtype:  in which it rests.
    copied: every rank holds this very interval; else the ranks of `Ranks.alike` do, or where it is `frozen` those of
            `Ranks.copies`, of which there may be one.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    numel: int
    dtype: torch.dtype
    copied: bool
    _rest: Rest
    _first: int = 0
    frozen: bool = False

    def read(self) -> Tensor:
        """(numel,) on the CPU, the caller's own."""
        return self.look().to("cpu", copy=True)

    def look(self) -> Tensor:
        """(numel,) where it rests, or a copy of what rests on a drive, for reading at once: not to keep or to change."""
        return self._rest.look(self._first, self.numel)

    @property
    def place(self) -> tuple[Rest, int, int]:
        """What it rests in, and (begin, count) there."""
        return (self._rest, *self._rest.range(self._first, self.numel))

    def write(self, values: Tensor) -> None:
        """Take (numel,) values of any floating dtype, or of this one. Raises StoreError where a drive fails."""
        self._rest.write(self._first, values)

    def part(self, begin: int, numel: int) -> Interval:
        """The elements [begin, begin + numel) of the parameter, which must lie in this interval."""
        return replace(self, begin=begin, numel=numel, _first=self._first + begin - self.begin)


def trained(model: ShardedModel, rests: Callable[[Trained], Slab] | None = None) -> list[Interval]:
    """The masters of the trained weights on this rank, or what else rests in that form: the slab that `rests` gives."""
    found = []
    for unit in model.units:
        own = unit.trained
        if own is not None:
            copied = not unit.plan.optimizer.sharded and model.ranks.owners.size > 1
            for piece in own.region.pieces:
                slot = own.buffer.layout.slots[piece.slot]
                slab = own.master if rests is None else rests(own)
                rest = Rest(slab, piece.in_shard, visits=visiting(slab, own))
                found.append(Interval(slot.name, slot.shape, piece.in_slot, piece.numel, slab.dtype, copied, rest))
    return found


def visiting(slab: Slab, trained: Trained) -> bool:
    """Whether a slab of this unit is in host memory and visits the device for a step."""
    return slab.in_memory and slab.tier is Tier.CPU and not trained.in_place


def frozen(model: ShardedModel) -> list[Interval]:
    """The frozen weights on this rank. They rest as bytes; the intervals are counted in elements of their own dtype."""
    found = []
    for buffer in (unit.frozen for unit in model.units if unit.frozen is not None):
        copied = not buffer.placement.sharded and model.ranks.shards.size > 1
        for piece in buffer.layout.pieces(buffer.rank):
            slot, member = buffer.layout.slots[piece.slot], buffer.members[piece.slot]
            size = member.dtype.itemsize
            rest = Rest(buffer.own_slice if buffer.slab is None else buffer.slab, piece.in_shard, member.dtype)
            begin, numel = piece.in_slot // size, piece.numel // size
            found.append(Interval(slot.name, slot.shape, begin, numel, member.dtype, copied, rest, frozen=True))
    return found


def share(intervals: Sequence[Interval], ranks: Ranks, *, apart: bool = False) -> list[Interval]:
    """Of intervals that several ranks hold this rank's equal part: over all ranks each element once.

    ranks: in the groups of the model that the intervals are of. apart: what every rank holds differs, so rank 0's counts.
    """
    whole = [interval for interval in intervals if interval.copied]
    frozen = [interval for interval in intervals if interval.frozen and not interval.copied]
    trained = [interval for interval in intervals if not interval.frozen and not interval.copied]
    return [
        *_equal_part(frozen, ranks.copies.rank, ranks.copies.size),
        *_equal_part(trained, ranks.alike.rank, ranks.alike.size),
        *(_equal_part(whole, ranks.rank, ranks.world_size) if not apart else whole if ranks.rank == 0 else ()),
    ]


def _equal_part(intervals: Sequence[Interval], place: int, holders: int) -> Iterator[Interval]:
    """What falls to the holder in this place of what `holders` ranks hold alike."""
    total = sum(interval.numel for interval in intervals)
    low, high = total * place // holders, total * (place + 1) // holders
    start = 0
    for interval in intervals:
        first, last = (_cut(bound - start, interval.numel) for bound in (low, high))
        if first < last:
            yield interval.part(interval.begin + first, last - first)
        start += interval.numel


def _cut(bound: int, numel: int) -> int:
    return min(numel, max(0, -(-bound // _CUT) * _CUT))


# After.


def publish(model: ShardedModel) -> None:
    """The masters were written: bring them into the weights that compute. Collective."""
    with torch.no_grad():
        for unit in model.units:
            trained = unit.trained
            if trained is None:
                continue
            if trained.in_place:
                trained.cast()
            elif not trained.shares_weights:
                trained.cast(model.engine.fetched(trained.master))
        for group in publishing.in_groups(model.units):
            publishing.send(group)
        publishing.arrive(model.units)
    model.settle()
