"""After a step: new masters become the weights of every rank, while the masters of other units still step.

Weights that are whole on every rank, but stepped in shards (stages 1 and 2), are published: each rank gathers the others'
parts. The units are stepped in groups, and a group's gather runs on the gather lane beside the steps of the next ones:

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

from ..zero.engine import Engine
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
    """Enqueue the gather of those of `units` that are published, as one collective a model. Collective.

    after: when this rank's parts are written; None where the computation enqueued so far writes them.
    """
    for engine, mine in _by_engine(units):
        lane = engine.lanes.gather
        lane.wait(engine.lanes.mark_compute() if after is None else after)
        with lane.on():
            buffers = [unit.trained.buffer for unit in mine if unit.trained is not None]
            engine.ranks.shards.all_gather_together([b.whole for b in buffers], [b.own_slice for b in buffers])


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
