"""After a step: new masters become the weights of every rank, while the masters of other units still step.

Weights that are whole on every rank, but stepped in shards (stages 1 and 2), are published: each rank gathers the others'
parts. So are shards of which each copy steps a part (`Plan.parts`): those that hold one gather it. The units are stepped in
groups, and a group's gather runs on the gather lane beside the steps of the next ones:

    compute   | step 0 | step 1 | step 2 | wait          | next forward
    gather             | gather 0   | gather 1   | gather 2 |

A gather takes longer than its step on any link that we know (two H200s: 8.7 ps an element against 7.1), so the order that
ends soonest is the smallest unit first (Johnson's rule for two machines): all gathers and one short step are what is left.
The computation waits for all of them at the end of the step, and not unit by unit in the next forward, since nothing tells
who reads a weight outside of a forward: docs/design/publishing.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import StoreError
from ..plan.plan import Tier
from ..ranks.group import Group
from ..ranks.nested import Nested
from ..zero.engine import Engine
from ..zero.trained import Trained
from ..zero.unit import Unit

# Bytes of whole weights. Two ranks step that many in 0.5 ms and gather them in 0.6 ms, while a fused AdamW and the collective
# cost the host 0.1 ms; adapters, which are smaller, keep to one call.
GROUP_NBYTES = 256 << 20


def in_groups(units: Sequence[Unit]) -> list[list[Unit]]:
    """`units` in the order in which they step, those together that share a step and a gather: the same on every rank.

    What nobody gathers is in the last group: its step hides the gathers before it.
    """
    groups: list[list[Unit]] = []
    room = 0
    for unit in sorted((u for u in units if u.publishes), key=_nbytes):
        if not groups or _nbytes(unit) > room:
            groups.append([])
            room = GROUP_NBYTES
        groups[-1].append(unit)
        room -= _nbytes(unit)
    others = [unit for unit in units if not unit.publishes]
    if not groups:
        return [others] if others else []
    groups[-1] += others
    return groups


def send(units: Sequence[Unit], *, after: torch.Event | None = None) -> None:
    """Enqueue the gather of those of `units` that are published, as one collective a model and kind. Collective.

    after: when this rank's parts are written; None where the computation enqueued so far writes them.
    """
    for engine, mine in _by_engine(units):
        lane = engine.lanes.gather
        lane.wait(engine.lanes.mark_compute() if after is None else after)
        with lane.on():
            wholes, shards = _Gather(), _Gather()
            for trained in (unit.trained for unit in mine if unit.trained is not None):
                buffer, region = trained.buffer, trained.region
                if not trained.plan.parameter.sharded:
                    wholes.add(buffer.whole, region.interval)
                elif buffer.travels:
                    _send_shard_at_rest(engine, trained)
                else:
                    shards.add(buffer.shard, region.in_shard)
            wholes.run(engine.ranks.owners)
            shards.run(engine.ranks.copies)


class _Gather:
    """Several flat tensors, each of which is gathered in place from this rank's part of it."""

    def __init__(self) -> None:
        self._wholes: list[Tensor] = []
        self._parts: list[Tensor] = []

    def add(self, whole: Tensor, part: slice) -> None:
        self._wholes.append(whole)
        self._parts.append(whole[part])

    def run(self, over: Group | Nested) -> None:
        if self._wholes:
            over.all_gather_together(self._wholes, self._parts)


def _send_shard_at_rest(engine: Engine, trained: Trained) -> None:
    """Gather a shard that rests off the device from the new masters, on the gather lane, and put all of it to rest."""
    lanes, slab, master = engine.lanes, trained.buffer.slab, trained.master
    assert slab is not None
    values = (
        master.tensor if master.tier is Tier.GPU else torch.empty(master.numel, dtype=master.dtype, device=lanes.device)
    )
    if master.tier is not Tier.GPU:
        lanes.up.wait(lanes.gather.mark())
        engine.land([master.fetch(values)], lanes.gather.wait)
    shard = torch.empty(slab.numel, dtype=slab.dtype, device=lanes.device)
    part = shard[trained.region.in_shard]
    part.copy_(values)
    engine.ranks.copies.all_gather(shard, part)
    lanes.down.wait(lanes.gather.mark())
    try:
        lanes.gather.wait(slab.put(shard).enqueued())  # the memory of `shard` is the gather lane's again behind it
    except StoreError as error:
        engine.faults.note(error)


def arrive(units: Sequence[Unit]) -> None:
    """The computation waits for everything that was sent of `units`: from here on anybody may read their weights."""
    for engine, _ in _by_engine(units):
        engine.lanes.compute_waits(engine.lanes.gather.mark())


@contextmanager
def fenced(engines: Sequence[Engine]) -> Iterator[None]:
    """Inside, this rank may write into shards that the others copy. Collective where there are such."""
    peers = [engine.peers for engine in engines if engine.peers is not None]
    for each in peers:
        each.before_step()
    try:
        yield
    finally:
        for each in peers:
            each.after_step()


def _nbytes(unit: Unit) -> int:
    return unit.trained.buffer.whole_nbytes if unit.trained is not None else 0


def _by_engine(units: Sequence[Unit]) -> list[tuple[Engine, list[Unit]]]:
    """Those that are published, with their model's engine."""
    found: dict[int, tuple[Engine, list[Unit]]] = {}
    for unit in units:
        if unit.publishes:
            found.setdefault(id(unit.engine), (unit.engine, []))[1].append(unit)
    return list(found.values())
