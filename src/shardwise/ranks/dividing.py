"""Groups inside a run: which ranks hold one copy of a model together, and which of them hold the same part of it.

    four ranks                           shard_group: 2             ranks 0 and 2 on one machine, 1 and 3 on another
    shards    (0 1 2 3)                  (0 1)(2 3)                 (0 2)(1 3)
    copies    (0)(1)(2)(3)               (0 2)(1 3)                 (0 1)(2 3)

Groups are filled machine by machine, in the order of the ranks, so that a group that fits on a machine lies on one. Every rank
knows where all sit, and comes to the same division without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..config.agreement import ranks_said
from ..errors import ConfigError

ShardGroup = Literal["world", "machine"] | int


@dataclass(frozen=True)
class Division:
    """groups: of equally many ranks, each in ascending order; every rank of the run is in one of them."""

    groups: tuple[tuple[int, ...], ...]

    def shards(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold one copy together with `rank`."""
        return next(group for group in self.groups if rank in group)

    def copies(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part as `rank`: those in its place of every group."""
        place = self.shards(rank).index(rank)
        return tuple(sorted(group[place] for group in self.groups))


def divide(shard_group: ShardGroup, world_size: int, machines: Sequence[int]) -> Division:
    """The groups of a run. machines: by rank, the number of its machine; empty where all are on one.

    Raises ConfigError for a number that does not divide the ranks, and for machines with different numbers of ranks.
    """
    where = machines or [0] * world_size
    in_order = sorted(range(world_size), key=lambda rank: (where[rank], rank))
    if shard_group == "machine":
        by_machine = [tuple(r for r in in_order if where[r] == number) for number in dict.fromkeys(sorted(where))]
        if len({len(ranks) for ranks in by_machine}) > 1:
            found = ", ".join(f"machine {number} has {ranks_said(ranks)}" for number, ranks in enumerate(by_machine))
            raise ConfigError(
                f"shard_group: machine needs equally many ranks on every machine, and {found}. Start as many on each, or take "
                f"world, or a number that divides the {world_size} ranks."
            )
        return Division(tuple(by_machine))
    size = world_size if shard_group == "world" else int(shard_group)
    if size < 1 or world_size % size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(
            f"shard_group: {size} does not divide the {world_size} rank(s) of this run. Take a number that does ({divisors}), "
            "machine or world."
        )
    return Division(tuple(tuple(sorted(in_order[at : at + size])) for at in range(0, world_size, size)))
