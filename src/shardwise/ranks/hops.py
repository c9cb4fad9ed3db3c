"""In how few hops every rank hears of every other: who sends to whom, and how much of what it has heard. Pure arithmetic.

At each hop a rank sends twice as far as before, so what it knows doubles: of itself, of 2 ranks, of 4, ... of all. Five ranks:

    rank 3 knows      3         3 2         3 2 1 0         3 2 1 0 4
    hop               +1 <- 2   +2 <- 1     +4 <- 4         to (rank + distance), from (rank - distance), modulo 5

That is ceil(log2(ranks)) hops, for any number of ranks. A ring, which gloo takes for its own collectives, has one for each rank
more. Sources: Bruck et al. 1997 (all-gather); Hensgen, Finkel and Manber 1988 (the same hops, for a barrier).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hop:
    """to, source: ranks. known: of how many ranks the sender has heard, the nearest below it first, itself among them.

    sent: how many of these the receiver lacks, from the first on; all but at the last hop.
    """

    to: int
    source: int
    known: int
    sent: int


def hops(rank: int, world_size: int) -> tuple[Hop, ...]:
    """Those of one rank, in order; () for a run of one."""
    found, known = [], 1
    while known < world_size:
        sent = min(known, world_size - known)
        found.append(Hop((rank + known) % world_size, (rank - known) % world_size, known, sent))
        known += sent
    return tuple(found)


def heard_of(rank: int, world_size: int) -> list[int]:
    """The ranks in the order in which `rank` hears of them: itself, then those below it, round to the one above it."""
    return [(rank - place) % world_size for place in range(world_size)]
