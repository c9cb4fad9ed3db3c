"""Parameters that one rank steps whole: those of optimizers that look at all of a matrix, as Muon and Adafactor do.

Masters and gradients stay in shards, cut at elements, as every optimizer has them: gathers, reductions, norms and checkpoints
know of nothing else. For its step a parameter comes together on its owner, which has the states, and goes back:

    rank 0   [ a a a b b ]         to owners   rank 0: a a a            back   [ a a a b b ]
    rank 1   [ b b c c . ]                     rank 1: b b b b, c c            [ b b c c . ]

So each is computed once, with the class's own step on a tensor in the parameter's own shape.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..offload.store import Slab
from ..plan.layout import Piece, Region
from ..zero.engine import Engine
from ..zero.trained import Trained
from .doubles import double
from .kept import mapped
from .moments import counted, resting_slab
from .overrides import standing_in
from .resting import OFFLOADED
from .running import run_step
from .state_kinds import is_like

# How much more than an equal share a rank may get to do for the sake of a parameter that lies on it.
_SLACK = 1.02


class Whole:
    """One parameter that one rank steps.

    owner:  the place of that rank among the ranks that divide the masters; None where each of them has all, and steps it.
    tensor: what the optimizer holds of it there: a stand-in on the meta device, in the parameter's shape.
    states: elementwise states that rest off the device, by key; flat.
    """

    state_begin = 0

    def __init__(self, trained: Trained, index: int, group: int, engine: Engine) -> None:
        slot = trained.buffer.layout.slots[index]
        self.trained = trained
        self.index = index
        self.group = group
        self.engine = engine
        self.shape = slot.shape
        self.numel = slot.numel
        self.in_slot = 0
        self.owner: int | None = None
        self.tensor = Parameter(torch.empty(slot.shape, dtype=trained.master.dtype, device="meta"))
        self.states: dict[str, Slab] = {}

    @property
    def parameter(self) -> Parameter:
        """The user's own object."""
        return self.trained.buffer.members[self.index].parameter

    @property
    def is_own(self) -> bool:
        """Whether this rank steps it."""
        return self.owner is None or self.owner == self.engine.ranks.owners.rank

    @property
    def used(self) -> bool:
        """Whether it has a gradient; the same on every rank."""
        return self.trained.gradients.at_rest is not None and self.trained.gradients.used[self.index]

    def state_at_rest(self, name: str, dtype: torch.dtype) -> Any:
        """Make room for an elementwise state; gives what the optimizer's dictionary holds for it."""
        if self.trained.in_place:
            return torch.zeros(self.shape, dtype=dtype, device=self.trained.master.tensor.device)
        slab = self.states.get(name)
        if slab is None or slab.dtype != dtype:
            words = f"{self.trained.buffer.members[self.index].name}.{name}"
            tier = self.trained.plan.optimizer.tier
            slab = resting_slab(self.engine, tier, name, self.numel, dtype, words, tells=True)
            self.states[name] = slab
        return slab.tensor.view(self.shape) if slab.in_memory else OFFLOADED

    def brought(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Its states on the device, for a step."""
        device, found = self.engine.ranks.device, {}
        for name, value in state.items():
            if name in self.states and (isinstance(value, Tensor) or value is OFFLOADED):
                found[name] = self.engine.look_at(self.states[name]).view(self.shape)
            elif self.trained.in_place:
                found[name] = value
            else:
                found[name] = mapped(value, lambda tensor: tensor.to(device) if tensor.ndim else tensor)
        return found

    def put_to_rest(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """States behind a step; gives what the optimizer's dictionary holds of them."""
        if self.trained.in_place:
            return dict(state)
        found: dict[str, Any] = {}
        step = counted([state], self.engine.ranks.device) if self.trained.codes_states else None
        for name, value in state.items():
            elementwise = bool(self.shape) and is_like(value, self.shape)
            if elementwise or name in self.states:  # of a parameter without dimensions, what was loaded as such
                found[name] = self.state_at_rest(name, value.dtype)
                self.engine.put_to_rest(value.contiguous().view(-1), self.states[name], step)
            else:
                found[name] = mapped(value, lambda tensor: tensor.to("cpu") if tensor.ndim else tensor)
        return found


def cost_of(shape: Sequence[int]) -> int:
    """In proportion to operations: of a matrix those of Newton-Schulz, as Muon has them, else a pass over the elements."""
    if len(shape) < 2:
        return math.prod(shape)
    short, long = sorted((shape[0], math.prod(shape[1:])))
    return short * short * (2 * long + short)


def owners_of(costs: Sequence[int], held: Sequence[Mapping[int, int]], load: list[int]) -> list[int]:
    """Who steps each parameter: the dearest first, where most of it lies, unless that rank has its share already.

    costs, held: of each parameter its cost, and its elements by place. load: of each place, what it has to do already; is
    added to. Every rank comes to the same without a message.
    """
    share = (sum(costs) + sum(load)) / len(load)
    found = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        cost, lies = costs[number], held[number]
        most = max(_SLACK * share, min(load) + cost)
        fits = [place for place, has in enumerate(load) if has + cost <= most]
        found[number] = max(fits, key=lambda place: (lies.get(place, 0), -load[place], -place))
        load[found[number]] += cost
    return found


def assign(wholes: Sequence[Whole], before: Sequence[Whole]) -> None:
    """Give each of `wholes` its owner. before: those that have theirs."""
    parted = [w for w in wholes if w.trained.region.rank is not None and w.engine.ranks.owners.size > 1]
    if not parted:
        return
    load = [0] * parted[0].engine.ranks.owners.size
    for whole in before:
        if whole.owner is not None:
            load[whole.owner] += cost_of(whole.shape)
    held = [{place: sum(p.numel for p in pieces) for place, pieces in _pieces(whole).items()} for whole in parted]
    for whole, owner in zip(parted, owners_of([cost_of(w.shape) for w in parted], held, load), strict=True):
        whole.owner = owner


def _pieces(whole: Whole) -> dict[int, list[Piece]]:
    """Where it lies: by place among the owners of masters, in the order of its elements."""
    region, size = whole.trained.region, whole.engine.ranks.owners.size
    found: dict[int, list[Piece]] = {}
    for place in range(size):
        pieces = [p for p in Region(region.layout, place, region.parts).pieces if p.slot == whole.index]
        if pieces:
            found[place] = pieces
    return found


@dataclass
class _Together:
    """The parameters of one unit that are stepped whole, on the way to their owners and back.

    master: this rank's part of all of them, on the device. mine: master and gradient of each of its own, in their shapes.
    came, went: when they are there, and when the new values are in `master`. stepped: new values, by id of a Whole.
    """

    live: list[Whole]
    master: Tensor
    mine: list[tuple[Tensor, ...]]
    came: torch.Event | None = None
    went: torch.Event | None = None
    stepped: dict[int, Tensor] = field(default_factory=dict)


class WholeSteps:
    """Steps the whole parameters of one optimizer, unit by unit; both ways run on the gather lane beside other units' steps:

    gather    | to owners 0 | to owners 1 |          | back 0 | to owners 2 | back 1 |
    compute                 | step 0               | step 1               | step 2
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._known: dict[int, dict[int, list[Piece]]] = {}  # by the id of a Whole, which lives as long

    def step(
        self, units: Iterable[Sequence[Whole]], factor: Tensor | None, before: Any
    ) -> Iterator[tuple[Sequence[Whole], Tensor]]:
        """Step those that have a gradient, of each unit in turn. Collective.

        factor: by which gradients are multiplied. before: a double of the optimizer as the step began. Gives each unit where
        there was something to step, and the new masters of this rank, which the computation may read: on the device, and
        the master itself where it is in place.
        """
        coming: deque[_Together] = deque()
        going: deque[_Together] = deque()
        for unit in units:
            live = [whole for whole in unit if whole.used]
            if live:
                coming.append(self._bring(live))
            if len(coming) > 1:
                going.append(self._stepped(coming.popleft(), factor, before))
            if len(going) > 1:
                yield from self._arrived(going.popleft())
        while coming:
            going.append(self._stepped(coming.popleft(), factor, before))
        while going:
            yield from self._arrived(going.popleft())

    def _bring(self, live: list[Whole]) -> _Together:
        """Enqueue the way to the owners."""
        trained, engine = live[0].trained, live[0].engine
        at_rest = trained.gradients.at_rest
        assert at_rest is not None
        lanes, parted = engine.lanes, live[0].owner is not None
        if parted:
            lanes.gather.wait(lanes.mark_compute())
        with lanes.gather.on() if parted else nullcontext():
            master = trained.master.tensor if trained.in_place else engine.look_at(trained.master)
            host = trained.gradients.host
            gradient = (at_rest if host is None else engine.look_at(host)).to(master.device, master.dtype)
            if parted:
                return _Together(live, master, self._to_owners(live, [master, gradient]), came=lanes.gather.mark())
        view = trained.buffer.view
        return _Together(live, master, [(view(w.index, master).clone(), view(w.index, gradient).clone()) for w in live])

    def _stepped(self, unit: _Together, factor: Tensor | None, before: Any) -> _Together:
        """Enqueue the steps of this rank's own, and the way back."""
        live, lanes = unit.live, unit.live[0].engine.lanes
        lanes.compute_waits(unit.came)
        if live[0].owner is None:
            view = live[0].trained.buffer.view
            for whole, values in self._run(live, unit.mine, factor, before):
                view(whole.index, unit.master).copy_(values)
            return unit
        own = [whole for whole in live if whole.is_own]
        for whole, values in self._run(own, unit.mine, factor, before):
            unit.stepped[id(whole)] = values.reshape(-1)
        lanes.gather.wait(lanes.mark_compute())
        unit.mine.clear()  # the gather lane's memory, which that lane waits for
        with lanes.gather.on():
            self._back(live, unit.stepped, unit.master)
            unit.went = lanes.gather.mark()
        return unit

    @staticmethod
    def _arrived(unit: _Together) -> Iterator[tuple[Sequence[Whole], Tensor]]:
        lanes = unit.live[0].engine.lanes
        lanes.compute_waits(unit.went)
        unit.stepped.clear()  # the computation's memory, which it may use again from here on
        yield unit.live, unit.master
        if unit.went is not None and not unit.live[0].trained.in_place:
            lanes.gather.wait(lanes.mark_compute())  # what came up is memory of that lane

    def _where(self, whole: Whole) -> dict[int, list[Piece]]:
        if id(whole) not in self._known:
            self._known[id(whole)] = _pieces(whole)
        return self._known[id(whole)]

    def _to_owners(self, live: Sequence[Whole], flats: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Of each of this rank's own: these flats' elements in the parameter's shape. flats: (region.numel,) of one dtype."""
        owners = live[0].engine.ranks.owners
        sent: list[list[Tensor]] = [[flats[0][:0]] for _ in range(owners.size)]
        sizes = [0] * owners.size
        for whole in live:
            assert whole.owner is not None
            if whole.is_own:
                for place, pieces in self._where(whole).items():
                    if place != owners.rank:
                        sizes[place] += len(flats) * sum(piece.numel for piece in pieces)
                continue
            for piece in self._where(whole).get(owners.rank, []):
                sent[whole.owner] += [flat[piece.in_shard : piece.in_shard + piece.numel] for flat in flats]
        got = owners.all_to_all([torch.cat(parts) for parts in sent], sizes)
        at = [0] * owners.size
        found = []
        for whole in (one for one in live if one.is_own):
            rows = tuple(flats[0].new_empty(whole.numel) for _ in flats)
            for place, pieces in self._where(whole).items():
                for piece in pieces:
                    for row, flat in zip(rows, flats, strict=True):
                        if place == owners.rank:
                            came = flat[piece.in_shard : piece.in_shard + piece.numel]
                        else:
                            came = got[place][at[place] : at[place] + piece.numel]
                            at[place] += piece.numel
                        row[piece.in_slot : piece.in_slot + piece.numel].copy_(came)
            found.append(tuple(row.view(whole.shape) for row in rows))
        return found

    def _back(self, live: Sequence[Whole], stepped: Mapping[int, Tensor], master: Tensor) -> None:
        """New values go from owners into `master`, this rank's part of each."""
        owners = live[0].engine.ranks.owners
        sent: list[list[Tensor]] = [[master[:0]] for _ in range(owners.size)]
        sizes = [0] * owners.size
        for whole in live:
            assert whole.owner is not None
            for place, pieces in self._where(whole).items():
                for piece in pieces:
                    if whole.is_own and place != owners.rank:
                        sent[place].append(stepped[id(whole)][piece.in_slot : piece.in_slot + piece.numel])
                    elif place == owners.rank and not whole.is_own:
                        sizes[whole.owner] += piece.numel
        got = owners.all_to_all([torch.cat(parts) for parts in sent], sizes)
        at = [0] * owners.size
        for whole in live:
            assert whole.owner is not None
            for piece in self._where(whole).get(owners.rank, []):
                if whole.is_own:
                    come = stepped[id(whole)][piece.in_slot : piece.in_slot + piece.numel]
                else:
                    come = got[whole.owner][at[whole.owner] : at[whole.owner] + piece.numel]
                    at[whole.owner] += piece.numel
                master[piece.in_shard : piece.in_shard + piece.numel].copy_(come)

    def _run(
        self, own: Sequence[Whole], values: Sequence[tuple[Tensor, ...]], factor: Tensor | None, before: Any
    ) -> Iterator[tuple[Whole, Tensor]]:
        """The class's own step on whole tensors; gives each, and its new one. values: master and gradient of each."""
        if not own:
            return
        one = double(before)
        tensors = []
        for whole, (master, gradient) in zip(own, values, strict=True):
            tensor = Parameter(master)
            tensor.grad = gradient if factor is None else gradient.mul_(factor.to(gradient.device))
            state = self.optimizer.state.get(whole.tensor)
            if state:
                one.state[tensor] = whole.brought(state)
            one.param_groups[whole.group]["params"].append(tensor)
            tensors.append(tensor)
        keys = [id(whole.parameter) for whole in own]
        with standing_in(one, lambda: zip(keys, tensors, strict=True)):
            run_step(one, hooks=False)
        for whole, tensor in zip(own, tensors, strict=True):
            self.optimizer.state[whole.tensor] = whole.put_to_rest(one.state[tensor])
            yield whole, tensor.detach()
