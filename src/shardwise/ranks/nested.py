"""The ranks of several groups as one: each shard of a group is cut into parts, one for each copy of it.

    four ranks, two of which hold one copy together        a buffer of eight elements

    shards   (0 1)(2 3)                                    |----- 0 and 2 -----|----- 1 and 3 -----|
    nested   (0 2 1 3), in the order of their parts        |--- 0 ---|--- 2 ---|--- 1 ---|--- 3 ---|

So a rank's part lies in its shard. A buffer is gathered from parts in two steps, over the copies and then over the shards, and
reduced in the opposite order: between machines each element goes once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .dividing import Division
from .group import Group, ReduceOp


class Nested:
    """Every rank of `division`, the group of those that divide masters and states: a `Group` as far as these need one."""

    def __init__(self, shards: Group, copies: Group, everyone: Group, division: Division) -> None:
        self._everyone = everyone
        self._shards = shards
        self._copies = copies
        self.rank = shards.rank * copies.size + copies.rank
        self.size = shards.size * copies.size
        self.members = tuple(rank for member in shards.members for rank in division.copies(member))

    def _slice(self, whole: Tensor) -> Tensor:
        """This rank's shard of `whole`."""
        numel = whole.numel() // self._shards.size
        return whole[self._shards.rank * numel : (self._shards.rank + 1) * numel]

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """See `Group.all_gather`; the parts in the order of `members`."""
        self.all_gather_together([whole], [part])

    def all_gather_together(self, wholes: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """See `Group.all_gather_together`."""
        slices = [self._slice(whole) for whole in wholes]
        self._copies.all_gather_together(slices, parts)
        self._shards.all_gather_together(wholes, slices)

    def reduce_scatter(self, partial: Tensor, out: Tensor) -> None:
        """See `Group.reduce_scatter`."""
        own = self._slice(partial)
        self._shards.reduce_scatter(partial, own)
        self._copies.reduce_scatter(own, out)

    def all_to_all(self, sent: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """See `Group.all_to_all`; `sent`, `sizes` and what comes in the order of `members`."""
        places = [self.members.index(rank) for rank in range(self.size)]
        got = self._everyone.all_to_all([sent[place] for place in places], [sizes[place] for place in places])
        return [got[rank] for rank in self.members]

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> None:
        """See `Group.all_reduce`."""
        self._shards.all_reduce(tensor, op)
        self._copies.all_reduce(tensor, op)
