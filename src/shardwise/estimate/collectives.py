"""How long a collective takes over ranks and machines: arithmetic on bytes, see docs/scaling.md. Nothing here is run.

A gather of n bytes over p ranks, `per_machine` to a machine, takes

    launch + hops x latency + max(n (1 - 1/p) / nvlink, n (1 - 1/machines) / (per_machine x network))

and a reduction the same of its own bytes.
"""

from __future__ import annotations

import math

from ..plan.compressed import CHUNK, Packing
from .terms import Terms


def collective_s(nbytes: int, ranks: int, terms: Terms) -> float:
    """Seconds that an all-gather to `nbytes`, or a reduce-scatter from them, takes over `ranks`."""
    if ranks == 1 or not nbytes:
        return 0.0
    local = min(ranks, terms.per_machine)
    machines = -(-ranks // terms.per_machine)
    inside = nbytes * (1 - 1 / ranks) / terms.nvlink
    between = nbytes * (1 - 1 / machines) / (local * terms.network)
    hops = (local - 1) * terms.latency + (machines - 1) * terms.network_latency
    return terms.launch + hops + max(inside, between)


def gather_s(nbytes: int, ranks: int, terms: Terms, *, codes: bool) -> float:
    """`collective_s` of 16-bit weights; codes: as `gather_dtype: int8` has it, which changes nothing inside of a machine."""
    if not codes or ranks <= terms.per_machine or not nbytes:
        return collective_s(nbytes, ranks, terms)
    numel = nbytes // 2
    packing = Packing(numel // ranks, ranks)
    # Of each weight of the shard: its range is read, it is cast, divided, rounded, clamped, freed of NaN and stored.
    made = 45 * packing.numel / terms.memory + 15 * math.ceil(packing.numel / CHUNK) * terms.kernel
    read = 3 * numel / terms.memory + terms.kernel
    return collective_s(packing.nbytes, ranks, terms) + made + read


def all_reduce_s(nbytes: int, group: int, ranks: int, terms: Terms) -> float:
    """Seconds in which the copies of `ranks` in groups of `group` average a gradient of `nbytes`, a shard of it each."""
    copies, machines = ranks // group, -(-ranks // terms.per_machine)
    if copies == 1 or not nbytes:
        return 0.0
    inside = 2 * nbytes / group * (1 - 1 / copies) / terms.nvlink
    between = 2 * nbytes * (1 - 1 / machines) / (min(ranks, terms.per_machine) * terms.network)
    hops = 2 * math.ceil(math.log2(copies)) * (terms.network_latency if machines > 1 else terms.latency)
    return terms.launch + hops + max(inside, between)


def over_copies_s(nbytes: int, group: int, ranks: int, terms: Terms) -> float:
    """Seconds in which the copies of `ranks` in groups of `group` reduce and divide `nbytes`, or gather them; along a ring."""
    copies, machines = ranks // group, -(-ranks // terms.per_machine)
    if copies == 1 or not nbytes:
        return 0.0
    inside = nbytes / group * (1 - 1 / copies) / terms.nvlink
    between = nbytes * (1 - 1 / machines) / (min(ranks, terms.per_machine) * terms.network)
    hops = (copies - 1) * (terms.network_latency if machines > 1 else terms.latency)
    return terms.launch + hops + max(inside, between)
