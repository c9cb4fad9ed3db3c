"""The bytes of optimizers' states on every rank: where `keeping.py` says what is kept, and the engine who keeps it.

    in shards      of each piece on a rank its elements, and what is beside; off the device whole grains (`footprint.py`)
    whole          of each parameter all, on the rank that owns it (`owners_of`), or on every rank where each steps all

Arithmetic on names and shapes; ranks differ, so there is a ledger for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..offload.footprint import Footprint, grain_of
from ..plan.blueprint import Blueprint, Ledger
from ..plan.layout import Layout
from ..plan.plan import Tier
from ..plan.state_dtypes import StateDtype, state_nbytes
from ..step.moments import is_moment
from ..step.ways import Handling
from ..step.wholes import cost_of, owners_of
from .keeping import Keeps, Stepper

IN_SHARDS, WHOLE, EVERYWHERE = "in shards", "whole, one rank each", "whole, on every rank"


@dataclass(frozen=True)
class _Held:
    """One parameter that an optimizer drives, the `stepper`th. owner: who steps it whole; None: every rank, or in shards."""

    stepper: int
    blueprint: int
    index: int
    keeps: Keeps
    whole: bool
    owner: int | None = None


class States:
    """What the optimizers of one run keep under one plan.

    blueprints: of all the model's units. shards: ranks that divide a buffer. ranks: of the run. cuda: the device is a GPU.
    state_dtype: in which moments that visit the device rest.
    Raises OptimizerError where `prepare` would.
    """

    def __init__(
        self,
        blueprints: Sequence[Blueprint],
        steppers: Sequence[Stepper],
        shards: int,
        *,
        ranks: int | None = None,
        cuda: bool = False,
        state_dtype: StateDtype = "fp32",
    ) -> None:
        self._blueprints = blueprints
        self._shards = shards
        self._cuda = cuda
        self._state_dtype = state_dtype
        trained = [blueprint for blueprint in blueprints if blueprint.trainable]
        self._sharded = any(blueprint.plan.optimizer.sharded for blueprint in trained)
        self.places = shards * max((b.plan.parts for b in trained), default=1) if self._sharded else 1
        visits = any(blueprint.plan.optimizer.tier.visits(cuda=cuda) for blueprint in trained)
        self._handling = Handling(self.places > 1, visits, ranks or self.places)
        # Of each optimizer, what it has to do on each rank: in the unit of `cost_of`.
        self.loads: list[list[int]] = []
        self.how: list[tuple[str, str]] = []
        self._held = [held for place, stepper in enumerate(steppers) for held in self._of(stepper, place)]

    def _of(self, stepper: Stepper, place: int) -> list[_Held]:
        judgement = stepper.judgement(self._handling)
        homes = {
            id(member.parameter): (number, index)
            for number, blueprint in enumerate(self._blueprints)
            for index, member in enumerate(blueprint.trainable)
        }
        found: list[_Held] = []
        load = [0] * self.places
        kinds = []
        for group, own in enumerate(stepper.parameters):
            driven = [homes[key] for key in own if key in homes]
            whole = judgement.is_whole(group)
            parted = whole and self.places > 1
            owners: list[int | None] = [None] * len(driven)
            if parted:
                costs = [cost_of(self._blueprints[b].trainable[i].parameter.shape) for b, i in driven]
                lies = [{p: end - begin for p, begin, end in self._pieces(b, i)} for b, i in driven]
                owners = [*owners_of(costs, lies, load)]
            for (number, index), owner in zip(driven, owners, strict=True):
                blueprint = self._blueprints[number]
                shape = tuple(blueprint.trainable[index].parameter.shape) if whole else None
                keeps = stepper.keeps(group, shape, blueprint.master_dtype)
                found.append(_Held(place, number, index, keeps, whole, owner))
            kinds += [WHOLE if parted else EVERYWHERE if whole else IN_SHARDS] if driven else []
        self.loads += [load] if any(load) else []
        self.how.append((stepper.name, " and ".join(dict.fromkeys(kinds))))
        return found

    def _pieces(self, number: int, index: int) -> Iterator[tuple[int, int, int]]:
        """(place, begin, end) of the parts in which a parameter lies, counted in each rank's region."""
        slot = self._layouts[number].slots[index]
        if not self._sharded:
            yield 0, slot.offset, slot.offset + slot.numel
            return
        each = self._numels[number]
        begin, end = slot.offset, slot.offset + slot.numel
        while begin < end:
            stop = min(end, (begin // each + 1) * each)
            yield begin // each, begin % each, begin % each + stop - begin
            begin = stop

    @cached_property
    def _layouts(self) -> dict[int, Layout]:
        return {n: b.trainable_layout(self._shards) for n, b in enumerate(self._blueprints) if b.trainable}

    @cached_property
    def _numels(self) -> list[int]:
        """Of each blueprint, the elements that a rank steps."""
        return [b.region(self._shards, 0).numel if b.trainable else 0 for b in self._blueprints]

    @cached_property
    def ledgers(self) -> list[Ledger]:
        """Of each rank among those that divide the masters, or of one where all have all."""
        found: list[Ledger] = [{} for _ in range(self.places)]

        def add(place: int, tier: Tier, nbytes: int) -> None:
            if nbytes:
                found[place]["optimizer", tier] = found[place].get(("optimizer", tier), 0) + nbytes

        spans: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        slabs: dict[tuple[int, int, int], dict[str, torch.dtype]] = {}
        for held in self._held:
            blueprint = self._blueprints[held.blueprint]
            tier, keeps = blueprint.plan.optimizer.tier, held.keeps
            visits = tier.visits(cuda=self._cuda)
            if held.whole:
                numel = blueprint.trainable[held.index].parameter.numel()
                for place in range(self.places) if held.owner is None else [held.owner]:
                    add(place, tier, sum(self._rests(n, d, numel, visits) for n, d in keeps.elementwise.items()))
                    add(place, Tier.CPU if visits else tier, keeps.beside)
                continue
            for place, begin, end in self._pieces(held.blueprint, held.index):
                add(place, tier, keeps.beside)
                if visits:  # a slab has room for all that the optimizer steps of the unit, whatever has the state
                    spans.setdefault((held.stepper, held.blueprint, place), []).append((begin, end))
                    slabs.setdefault((held.stepper, held.blueprint, place), {}).update(keeps.elementwise)
                else:
                    add(place, tier, sum((end - begin) * dtype.itemsize for dtype in keeps.elementwise.values()))
        for key, states in slabs.items():
            _, number, place = key
            tier = self._blueprints[number].plan.optimizer.tier
            numel = Footprint(spans[key], self._numels[number], grain_of(tier, self._state_dtype)).numel
            add(place, tier, sum(self._rests(name, dtype, numel, visits=True) for name, dtype in states.items()))
        return found

    def _rests(self, name: str, dtype: torch.dtype, numel: int, visits: bool) -> int:
        if visits and is_moment(name, dtype):
            return state_nbytes(numel, self._state_dtype)
        return numel * dtype.itemsize

    @property
    def totals(self) -> list[int]:
        """Bytes of states on each rank."""
        return [sum(ledger.values()) for ledger in self.ledgers]

    @property
    def fullest(self) -> Ledger:
        """That of the rank which has most."""
        return self.ledgers[max(range(self.places), key=self.totals.__getitem__)]

    def in_chunks(self) -> Iterator[tuple[Blueprint, dict[str, torch.dtype]]]:
        """Units of which something visits the device chunk by chunk, each with the most states that come along in a step."""
        coming: dict[tuple[int, int], dict[str, torch.dtype]] = {}
        for held in self._held:
            if not held.whole and self._blueprints[held.blueprint].plan.optimizer.tier.visits(cuda=self._cuda):
                coming.setdefault((held.stepper, held.blueprint), {}).update(held.keeps.elementwise)
        most: dict[int, dict[str, torch.dtype]] = {}
        for (_, number), states in coming.items():  # the optimizers step one after another
            before = most.setdefault(number, states)
            if sum(dtype.itemsize for dtype in before.values()) < sum(dtype.itemsize for dtype in states.values()):
                most[number] = states
        return ((self._blueprints[number], states) for number, states in most.items())

    def whole_steps(self) -> int:
        """The most bytes on the device while one unit's whole parameters are stepped, besides what the class computes with.

        Master and gradient of this rank's part where they are not in place, and once more in the message to the owners; those
        of what a rank owns twice, as they come and in their shapes; states that come for the step.
        """
        own: dict[int, list[int]] = {}
        for held in self._held:
            if not held.whole:
                continue
            blueprint = self._blueprints[held.blueprint]
            numel, keeps = blueprint.trainable[held.index].parameter.numel(), held.keeps
            nbytes = numel * blueprint.master_dtype.itemsize * (2 if held.owner is None else 4)
            if blueprint.plan.optimizer.tier.visits(cuda=self._cuda):
                nbytes += keeps.beside + sum(numel * dtype.itemsize for dtype in keeps.elementwise.values())
            of_unit = own.setdefault(held.blueprint, [0] * self.places)
            for place in range(self.places) if held.owner is None else [held.owner]:
                of_unit[place] += nbytes
        most = 0
        for number, of_unit in own.items():
            blueprint = self._blueprints[number]
            times = (2 if self.places > 1 else 0) + (2 if blueprint.plan.optimizer.tier.visits(cuda=self._cuda) else 0)
            most = max(most, times * self._numels[number] * blueprint.master_dtype.itemsize + max(of_unit))
        return most
