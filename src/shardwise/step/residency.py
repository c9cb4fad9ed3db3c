"""What stays on the device although the plan offloads or shards it, because there is room.

A plan that offloads is a promise about the least memory, not a wish to be slow. After a measured step it is known what
a step needs, and what is left of the budget is filled, in the order of what a byte saves per step:

    optimizer   master, states and gradient of a unit: 16 bytes a parameter that go up and 12 that come down, never hidden;
                less where moments rest as codes, which are fp32 on the device
    weights     a unit's shards: each byte goes up twice, mostly hidden behind the computation
    whole       a frozen unit stays gathered: its collectives fall away too
    turn        a unit stays gathered from a forward to its backward: one gather of two falls away

What is moved is read where it is from then on, by the code that a plan without offload runs; so the numbers are that
plan's. Every rank moves the same, as much as the rank with the least room can hold.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from ..offload.store import Slab
from ..plan.plan import Tier
from ..zero.budget import FILLED_AFTER, Budget
from ..zero.flat import FlatBuffer
from ..zero.sharded import ShardedModel
from ..zero.unit import Unit
from .resting import UnitStates
from .visits import Shard

log = logging.getLogger("shardwise")

Move = Literal["optimizer", "weights", "whole"]


@dataclass(frozen=True)
class Choice:
    """One unit's part that can stay: what it is and the bytes that it takes on this rank's device."""

    unit: int
    move: Move
    nbytes: int


def choose(candidates: Sequence[Choice], room: int) -> list[Choice]:
    """Those that fit into `room` bytes, in the order given; one that does not fit leaves room for smaller ones."""
    chosen = []
    for candidate in candidates:
        if candidate.nbytes <= room:
            chosen.append(candidate)
            room -= candidate.nbytes
    return chosen


class Residency:
    """Fills a model's budget once, after a measured step.

    budget: bytes of device memory for this process, or "auto" for all that the device has.
    driven: ids of the gradients that the optimizer drives alone; only their states may move. states: of those by their id.
    """

    def __init__(
        self, model: ShardedModel, budget: int | str, driven: set[int], states: Mapping[int, UnitStates]
    ) -> None:
        self.model = model
        self.budget = budget
        self._driven = driven
        self._states = states
        self.settled = False
        self._steps = 0

    def after_step(self, optimizer: Optimizer, shards: Sequence[Shard]) -> None:
        """Collective. Called after every step; acts once."""
        self._steps += 1
        if self.settled or self._steps < FILLED_AFTER:
            return
        self.settled = True
        ranks = self.model.ranks
        budget = Budget(ranks.device, self.budget)
        mine = self.candidates()
        room, sizes = budget.beside(budget.peak(reserved=True)), [one.nbytes for one in mine]
        # A rank on which nothing of a unit has been stepped has no states of it: for all it is the rank that has most.
        rooms, *sizes_of = zip(*ranks.gather_objects((room, *sizes)), strict=True)
        room, sizes = min(rooms), [max(every) for every in sizes_of]
        chosen = choose([replace(one, nbytes=size) for one, size in zip(mine, sizes, strict=True)], room)
        self.model.schedule.abandon_open_pass()
        self.model.engine.synchronize()
        for choice in chosen:
            unit = self.model.units[choice.unit]
            if choice.move == "optimizer":
                _keep_optimizer(self.model, unit, optimizer, shards)
            elif choice.move == "weights":
                _keep_weights(self.model, unit)
        self.model.engine.faults.agree()
        whole = [self.model.units[c.unit] for c in chosen if c.move == "whole"]
        self.model.schedule.keep_whole(whole)
        over_turn = self.model.schedule.widen_turn(room - sum(choice.nbytes for choice in chosen))
        self.model.engine.synchronize()
        if ranks.rank == 0:
            log.warning("%s", self.table(chosen, room, over_turn))

    def candidates(self) -> list[Choice]:
        """Everything that is offloaded, best first."""
        found: list[Choice] = []
        units = list(enumerate(self.model.units))
        for i, unit in units:
            trained = unit.trained
            if trained is not None and id(trained) in self._driven and trained.master.tier is not Tier.GPU:
                states = self._states[id(trained)].slabs.values() if id(trained) in self._states else ()
                # The gradient stays too: it rests in the master's dtype. What was coded is numbers there.
                size = 2 * trained.master.nbytes + sum(slab.numel * slab.dtype.itemsize for slab in states)
                found.append(Choice(i, "optimizer", size))
        for i, unit in units:
            nbytes = sum(part.slab.nbytes for part in _movable(unit) if part.slab is not None)
            if nbytes:
                found.append(Choice(i, "weights", nbytes))
        for i, unit in units:
            if unit.trained is None and unit.frozen is not None and unit.frozen.slab is not None:
                found.append(Choice(i, "whole", unit.frozen.whole_nbytes - unit.frozen.slab.nbytes))
        return found

    def table(self, chosen: Iterable[Choice], room: int, over_turn: int = 0) -> str:
        """The placement in words, a line for each kind. over_turn: units that stay from a forward to its backward."""
        lines = [f"gpu_memory_budget {self.budget}: {room / 1e6:,.1f} MB were free after a step. On the device stay:"]
        chosen = list(chosen)
        for move, what in (
            ("optimizer", "optimizer states"),
            ("weights", "weight shards"),
            ("whole", "whole frozen units"),
        ):
            every = [c for c in self.candidates() if c.move == move]
            kept = [c for c in chosen if c.move == move]
            if kept or every:
                size = sum(c.nbytes for c in kept) / 1e6
                lines.append(
                    f"  {what:<20} of {len(kept):>3} units, {size:,.1f} MB; offloaded still {len(every)} units"
                )
        if over_turn:
            lines.append(f"  gathered weights     of {over_turn:>3} more units, from a forward to its backward")
        return "\n".join(lines)


def _movable(unit: Unit) -> list[FlatBuffer]:
    """Buffers whose shards travel and are no masters; a master that is the weights itself moves as an optimizer's."""
    stepped = unit.trained.buffer if unit.trained is not None and unit.trained.shares_weights else None
    return [part for part in unit.parts if part.travels and part is not stepped]


def _on_device(model: ShardedModel, slab: Slab) -> Slab:
    """The content of `slab` in a slab on the device."""
    kept = model.engine.stores.gpu.allocate(slab.numel, slab.dtype, "")
    kept.tensor.copy_(model.engine.look_at(slab))  # how many slabs there are is each rank's own: they agree behind all
    return kept


def _keep_weights(model: ShardedModel, unit: Unit) -> None:
    for part in _movable(unit):
        assert part.slab is not None
        part.slab = _on_device(model, part.slab)


def _keep_optimizer(model: ShardedModel, unit: Unit, optimizer: Optimizer, shards: Sequence[Shard]) -> None:
    trained = unit.trained
    assert trained is not None
    mine = [shard for shard in shards if shard.trained is trained]
    rests = next((shard.states for shard in mine), {})
    states: dict[str, Tensor] = {key: _on_device(model, slab).tensor for key, slab in rests.items()}
    master = _on_device(model, trained.master)
    if trained.shares_weights:
        trained.buffer.slab = master
    trained.rest_on_device(master)
    rests.clear()
    for shard in mine:
        state, first = optimizer.state.pop(shard.tensor, {}), shard.state_begin
        shard.stand_on(master)
        optimizer.state[shard.tensor] = {
            key: states[key][first : first + shard.numel] if key in states else value for key, value in state.items()
        }
    for number, group in enumerate(optimizer.param_groups):
        own = [shard.tensor for shard in shards if shard.group == number]
        group["params"] = own or group["params"]  # parameters that are stepped whole do not move
