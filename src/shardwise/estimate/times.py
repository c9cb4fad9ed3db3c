"""How long a step of a plan takes, by what it goes to: the schedule, the link, the drive, the optimizer and the host.

Each unit takes what its operations take on the device, or what the host takes to issue them, whichever is longer. The schedule
(`schedule.py`) adds gathers and reductions, and what rests off the device adds its copies; then the optimizer:

    on the device    masters, states and gradients are read, and written with 16-bit weights
    off the device   states and gradients come up, states and new weights go down; on a drive states are read and written there
    stages 1, 2      new weights are gathered beside it, group by group

Nothing of the next forward hides a step's end here: the time is that of a step that is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.offloads import DEVICES
from ..step.publishing import GROUP_NBYTES
from .bytes import Choice, Estimate, Run
from .collectives import collective_s
from .passes import Placed, at_stage, works_of
from .schedule import Work, published_over_copies_s, walk
from .terms import Terms
from .tracing import Operations, Traced

# Of the eager loss's bytes, what the compiled one reads and writes.
_COMPILED_LOSS = 0.25
# A unit's gradients become one flat fp32 buffer: 2 bytes read, 4 written.
_FLATTENED = 6


@dataclass(frozen=True)
class Way:
    """What a plan does besides its choice. kept: which part of what is offloaded stays on the device (a budget)."""

    recompute: bool = False
    compiled: bool = False
    kept: float = 0.0

    @property
    def words(self) -> tuple[str, ...]:
        """One for each thing."""
        found = {"recompute": self.recompute, "compile": self.compiled, "budget": self.kept > 0}
        return tuple(word for word, does in found.items() if does)


@dataclass(frozen=True)
class Timed:
    """Seconds of a step by what they go to; `total` is the sum."""

    products: float
    kernels: float
    host: float
    gathers: float
    reductions: float
    link: float
    drive: float
    optimizer: float

    @property
    def parts(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        parts = self.parts
        return max(parts, key=lambda name: parts[name])


NOTHING = Timed(0, 0, 0, 0, 0, 0, 0, 0)


class Clock:
    """The time of any plan of one model, batch and machine."""

    def __init__(
        self, placed: Sequence[Placed], traced: Traced, run: Run, terms: Terms, micro_batches: int = 1
    ) -> None:
        """placed, traced: the model's units, and what they compute. micro_batches: of a step."""
        self._placed = placed
        self._traced = traced
        self._run = run
        self._terms = replace(terms, per_machine=run.local_processes)
        self._micro_batches = micro_batches

    def timed(self, estimate: Estimate, way: Way) -> Timed:
        """A step of the plan whose bytes are `estimate`."""
        choice, run, terms = estimate.choice, self._run, self._terms
        spent = {one.key: self._spent(one, way) for one in self._placed}
        works, turn = works_of(
            self._placed,
            lambda one: (spent[one.key][0].longest, spent[one.key][1].longest),
            run.precision.reduce.itemsize,
        )
        works = at_stage(works, choice.stage, run.shards)

        def walked(passes: Sequence[Work]) -> tuple[float, float]:
            step = walk(
                passes, turn, run.world_size, terms, run.options.prefetch_units,
                group=run.shard_group, codes=run.compresses, all_own=run.all_own,
            )  # fmt: skip
            return step.exposed_gathers + step.slowed, step.exposed_reductions

        times = self._micro_batches
        once = 1 if choice.stage < 2 else times  # stages 0 and 1 reduce behind the last micro-batch, and send then
        gathers, reductions = walked(works)

        def waited(added: bool) -> float:
            copied = walked(self._with_copies(works, turn, choice, way, added=added))
            return max(0.0, sum(copied) - gathers - reductions)

        waits = 0.0
        if choice.offloads:
            waits = waited(False) + (once - 1) * waited(True)
        every = [part for ahead, behind in spent.values() for part in (ahead, behind)]
        on_drive = DEVICES[choice.param].on_disk
        update = self._update(estimate, way)
        return Timed(
            products=times * sum(part.products for part in every),
            kernels=times * sum(part.kernels for part in every) + (times - 1) * self._added_s(choice, way),
            host=times * sum(part.longest - part.products - part.kernels for part in every) + update.host,
            gathers=times * gathers + update.gathers,
            reductions=once * reductions,
            link=(0 if on_drive else waits) + update.link,
            drive=(waits if on_drive else 0) + update.drive,
            optimizer=update.optimizer,
        )

    def _spent(self, one: Placed, way: Way) -> tuple[_Spent, _Spent]:
        """Of a unit in its forward and its backward."""
        terms, last = self._terms, self._placed[-1].key
        ahead, behind = (
            self._operations(found, one.key, last) for found in (self._traced.forward, self._traced.backward)
        )
        compiled = way.compiled and one.place == "block"
        recomputed = way.recompute and one.place == "block"
        found = []
        for passed, call in ((ahead, terms.call), (behind, terms.backward_call)):
            products = kernels = host = 0.0
            for operations, belongs in passed:
                products += operations.products_s(terms)
                streams = operations.streams_s(terms, compiled=compiled and belongs)
                kernels += streams * (_COMPILED_LOSS if way.compiled and not belongs else 1)
                host += len(one.unit.entries) * terms.compiled_call if compiled else operations.calls * call
            kernels += one.decoded / (terms.eager * terms.memory)  # compiled too: a library's kernel of its own
            found.append(_Spent(products, kernels, host + terms.unit_call))
        forward, backward = found
        flat = (_FLATTENED * one.reduced / terms.memory + terms.kernel) if one.reduced else 0.0
        backward = replace(backward, kernels=backward.kernels + flat)
        if recomputed:
            backward = _Spent(*(a + b for a, b in zip(forward.values, backward.values, strict=True)))
        return forward, backward

    @staticmethod
    def _operations(found: dict[str, Operations], key: str, last: str) -> list[tuple[Operations, bool]]:
        """A unit's own, and with the last one those that belong to none."""
        mine = [(found.get(key, Operations()), True)]
        return [*mine, (found[""], False)] if key == last and "" in found else mine

    def _added_s(self, choice: Choice, way: Way) -> float:
        """In which a micro-batch's gradients are added to what is on the device: whole at stages 0 and 1, else this rank's."""
        added: float = sum(one.reduced for one in self._placed)
        if choice.stage >= 2:
            added = self._mine(choice, added) * (1.0 if choice.optimizer == "none" else way.kept)
        return 12 * added / self._terms.memory

    def _mine(self, choice: Choice, trained: float) -> float:
        """Of the elements that are trained those that this rank's optimizer steps."""
        own = self._run.world_size if self._run.all_own and choice.stage == 3 else self._run.shards
        return trained / (own if choice.stage else 1)

    def _with_copies(self, works: Sequence[Work], turn: int, choice: Choice, way: Way, *, added: bool) -> list[Work]:
        """The passes, with shards that come from where they rest and gradients that leave.

        added: gradients are added to those of micro-batches before, which one thread of the host does.
        """
        run, terms = self._run, self._terms
        comes = (1 - way.kept) / run.shards if choice.param != "none" else 0.0
        leaves = (1 - way.kept) / (run.world_size if run.all_own else run.shards) if choice.optimizer != "none" else 0.0
        fetched = [comes * work.gathered for work in works]
        landed = [leaves * work.reduced for work in works]
        up, down = sum(fetched[turn:]), sum(landed[turn:])
        span = terms.over_link(up, down)
        from_drive = run.local_processes / terms.read if DEVICES[choice.param].on_disk else 0.0
        found = []
        for place, (work, size, gone) in enumerate(zip(works, fetched, landed, strict=True)):
            each = 1 / terms.up if place < turn or not up else min(span / up, 1 / terms.both)
            back = max(min(span / down, 1 / terms.both), 1 / terms.adding if added else 0.0) if down else 0.0
            found.append(replace(work, fetch_s=size * max(each, from_drive), land_s=gone * back))
        return found

    def _update(self, estimate: Estimate, way: Way) -> _Update:
        """From the last gradient to the next forward."""
        run, terms, choice = self._run, self._terms, estimate.choice
        trained = sum(one.reduced for one in self._placed)
        mine = self._mine(choice, trained)
        states = sum(nbytes for (row, _), nbytes in estimate.nbytes.items() if row == "optimizer")
        on_device = (2 * states + 6 * mine) / terms.memory
        published = self._published_s(choice.stage, trained)
        if choice.optimizer == "none":
            groups = max(1, math.ceil(2 * trained / GROUP_NBYTES))
            shown = max(on_device / groups + published - on_device, published / groups) if published else 0.0
            return _Update(optimizer=on_device, gathers=shown, host=max(0.0, terms.host_step - on_device - shown))
        part = 1 - way.kept
        up, down = part * (states + 4 * mine), part * (states + (2 * mine if choice.param != "none" else 0))
        link, drive = terms.over_link(up, down), 0.0
        if DEVICES[choice.optimizer].on_disk:
            drive = part * states * run.local_processes * (1 / terms.read + 1 / terms.write)
        rest = way.kept * on_device
        longest = max(link, drive)
        shown = max(0.0, published - longest - rest)
        return _Update(
            optimizer=rest,
            link=link if link >= drive else 0.0,
            drive=drive if drive > link else 0.0,
            gathers=shown,
            host=max(0.0, terms.host_step - longest - rest),
        )

    def _published_s(self, stage: int, trained: int) -> float:
        """In which new weights that are whole on every rank are gathered, and with hpZ those of other copies."""
        run, terms = self._run, self._terms
        whole = trained if stage else 0
        if stage == 3:
            whole = sum(one.reduced for one in self._placed if one.adapters_stay_whole)
        if run.shards == 1:
            return 0.0
        crossing = published_over_copies_s(trained, run.shards, run.world_size, terms) if run.all_own else 0.0
        return collective_s(2 * whole, run.shards, replace(terms, nvlink=terms.alone)) + crossing


@dataclass(frozen=True)
class _Spent:
    """Seconds of a unit in one pass: on the device, and of the host that issues it."""

    products: float
    kernels: float
    host: float

    @property
    def values(self) -> tuple[float, float, float]:
        return self.products, self.kernels, self.host

    @property
    def longest(self) -> float:
        return max(self.products + self.kernels, self.host)


@dataclass(frozen=True)
class _Update:
    """Seconds that show behind a backward."""

    optimizer: float = 0.0
    gathers: float = 0.0
    link: float = 0.0
    drive: float = 0.0
    host: float = 0.0
