"""What an optimizer holds of a parameter on this rank, and the steps of shards that rest off the device.

A shard whose master rests in host memory or on a drive visits the device for its step: chunk by chunk, master, states and
gradient come up, the user's own optimizer runs on them there, and master and states go down again. So an offloaded step
runs the very kernels of one that is not offloaded, and gives its bits:

    up     | c0 | c1 | c2 | c3 |            16 bytes a parameter (fp32: master, two moments, gradient)
    step        | c0 | c1 | c2 | c3 |       the cast into the weights that compute is part of it
    down             | c0 | c1 | c2 | c3 |  12 bytes

With `optimizer_state_dtype` moments travel and rest as codes, and are fp32 only here, while they are stepped.

The host only enqueues: it is back in the script before the first chunk is down, and the next forward waits, unit by unit,
for what it reads. The chunks go in the order in which the forward needs the units. Why the device and not the host's cores:
docs/design/offload.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..offload.store import Arrival, Slab
from ..zero.generation import in_forward_order
from ..zero.sharded import ShardedModel
from ..zero.trained import Trained
from ..zero.unit import Unit
from . import publishing
from .doubles import double
from .elementwise import is_torchs
from .moments import counted
from .overrides import standing_in
from .resting import UnitStates
from .running import run_step

# Elements. 32 MiB of fp32 each: the link of an H200 takes longer for a chunk (2.6 ms) than a slow host takes to enqueue it
# (1.5), and a few of them are little memory. A multiple of a page in 16 bits too, because files are written by the page.
CHUNK = 8 << 20
_AHEAD = 2  # chunks on their way up while one steps
VISITING = _AHEAD + 3  # chunks that have memory on the device at most: those, the one that steps, two on their way down


class Shard:
    """One parameter's piece in this rank's master.

    tensor: what the optimizer holds: a view of the master where that can be read in place, else a stand-in on the meta
            device that has its shape. group: the number of its parameter group.
    shape:  of `tensor`: flat, unless this is all of a parameter whose optimizer must see its shape.
    unit_states: where its states rest that are not in place, with those of its optimizer's other shards of the unit; None of
            what no optimizer holds in shards.
    """

    __slots__ = ("begin", "end", "group", "in_slot", "index", "shape", "tensor", "trained", "unit_states")

    def __init__(
        self, trained: Trained, index: int, in_slot: int, begin: int, numel: int, shape: tuple[int, ...] | None = None
    ) -> None:
        self.trained = trained
        self.index = index
        self.begin, self.end = begin, begin + numel
        self.in_slot = in_slot
        self.group = 0
        self.unit_states: UnitStates | None = None
        self.shape = (numel,) if shape is None else shape
        self.tensor: Parameter
        self.stand_on(trained.master)

    def stand_on(self, master: Slab) -> None:
        """Be the optimizer's view of its elements in `master`."""
        if master.in_memory:
            self.tensor = Parameter(master.tensor[self.begin : self.end].view(self.shape))
        else:
            self.tensor = Parameter(torch.empty(self.shape, dtype=master.dtype, device="meta"))

    @property
    def numel(self) -> int:
        return self.end - self.begin

    @property
    def parameter(self) -> Parameter:
        """The user's own object."""
        return self.trained.buffer.members[self.index].parameter

    @property
    def states(self) -> dict[str, Slab]:
        """In what its states rest off the device, by key, from `state_begin` on."""
        return self.unit_states.slabs if self.unit_states is not None else {}

    @property
    def state_begin(self) -> int:
        """Where its first element lies in `states`."""
        return self.unit_states.footprint.place(self.begin) if self.unit_states is not None else 0

    def resting_place(self, key: str, dtype: torch.dtype) -> Any:
        """Make room for state `key`, which is not in place; gives what the optimizer's own dictionary holds for it."""
        assert self.unit_states is not None
        self.unit_states.slab(key, dtype)
        return self.stand_in(key)

    def stand_in(self, key: str) -> Any:
        """What the optimizer's own dictionary holds for the state that rests in `states[key]`."""
        assert self.unit_states is not None
        return self.unit_states.stand_in(key, self.begin, self.end)

    def gradient(self) -> Tensor | None:
        """The reduced gradient of this piece, or None if no rank used the parameter since the last step."""
        at_rest = self.trained.gradients.at_rest
        return (
            at_rest[self.begin : self.end] if at_rest is not None and self.trained.gradients.used[self.index] else None
        )


class _Visit:
    """Elements [begin, end) of one unit's master on the device, with what belongs to them.

    at_rest: where the optimizer's states of the unit lie; those of these elements are [first, first + numel) there.
    """

    def __init__(self, unit: Unit, trained: Trained, at_rest: UnitStates, begin: int, end: int) -> None:
        self.unit = unit
        self.trained = trained
        self.at_rest = at_rest
        self.begin, self.end = begin, end
        self.first = at_rest.footprint.place(begin)
        self.numel = at_rest.footprint.place(end) - self.first
        self.master: Tensor
        self.grad: Tensor
        self.states: dict[str, Tensor] = {}
        self.coming: dict[str, list[Tensor]] = {}  # states in the form in which they rest
        self.arrivals: list[Arrival] = []
        self.held: list[Tensor] = []
        self.down: torch.Event | None = None


class Visits:
    """Steps an optimizer over shards that are not in place."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(
        self,
        model: ShardedModel,
        units: Sequence[Unit],
        shards: Sequence[Shard],
        factor: Tensor | None,
        before: Any,
        *,
        fused: bool,
    ) -> None:
        """One step of `shards`, which belong to `units` of `model` or to other models.

        factor: what the gradients are multiplied by. fused: the optimizer takes it as a scale. before: a double of the
        optimizer as the step began.
        A drive's errors are noted; they are raised when the ranks agree on them.
        """
        engine = model.engine
        lanes = engine.lanes
        by_unit: dict[int, list[Shard]] = {}
        for shard in shards:
            by_unit.setdefault(id(shard.trained), []).append(shard)
        engine.stores.cpu.drain()  # gradients of several micro-batches are added up by a thread
        begun = {id(shard) for shard in shards if self.optimizer.state.get(shard.tensor)}
        lanes.step.wait(lanes.mark_compute())
        if factor is not None:
            # The computation's memory may be written again as soon as this returns, long before the lane has read it.
            with lanes.step.on():
                factor = factor.reciprocal().float() if fused else factor.clone()
            lanes.compute_waits(lanes.step.mark())
        with lanes.step.on():
            doubles = _Doubles(self.optimizer, before, engine.ranks.device, factor if fused else None)
        coming: deque[_Visit | Unit] = deque()
        going: deque[_Visit] = deque()

        def finish() -> None:
            visit = coming.popleft()
            if isinstance(visit, _Visit):
                self._finish(model, visit, by_unit, begun, None if fused else factor, doubles, going)
            else:  # behind all of a unit: also where nothing of it was here, or a drive failed, for the other ranks gather
                publishing.send([visit], after=lanes.step.mark())

        for visit in self._visits(in_forward_order(units, model.schedule), by_unit):
            if isinstance(visit, _Visit):
                self._bring(model, visit)
            coming.append(visit)
            while sum(isinstance(one, _Visit) for one in coming) > _AHEAD:
                finish()
        while coming:
            finish()
        while going:
            lanes.step.wait(going.popleft().down)
        publishing.arrive(units)
        for unit in units:
            if unit.trained is not None and unit.trained.buffer.slab is None:
                lanes.compute_waits(unit.published)

    def _visits(self, units: Sequence[Unit], by_unit: dict[int, list[Shard]]) -> Iterator[_Visit | Unit]:
        """Of each unit the chunks in which something is stepped, and behind them the unit itself."""
        for unit in units:
            trained = unit.trained
            if trained is None or trained.gradients.host is None:
                continue
            used = [s for s in by_unit.get(id(trained), []) if trained.gradients.used[s.index] and s.numel]
            within = {n for s in used for n in range(s.begin // CHUNK, -(-s.end // CHUNK))}
            for begin in (n * CHUNK for n in sorted(within)):
                at_rest = used[0].unit_states
                assert at_rest is not None
                yield _Visit(unit, trained, at_rest, begin, min(begin + CHUNK, trained.master.numel))
            yield unit

    def _bring(self, model: ShardedModel, visit: _Visit) -> None:
        """Enqueue everything that the visit needs on its way up."""
        trained, lanes, states = visit.trained, model.engine.lanes, visit.at_rest.slabs
        assert trained.gradients.host is not None
        numel = visit.end - visit.begin
        sources = [(slab, visit.begin, numel) for slab in (trained.master, trained.gradients.host)]
        sources += [(slab, visit.first, visit.numel) for slab in states.values()]
        with lanes.step.on():
            rooms = [slab.room(count, lanes.device) for slab, _, count in sources]
        (visit.master,), (visit.grad,) = rooms[:2]
        visit.coming = dict(zip(states, rooms[2:], strict=True))
        lanes.up.wait(lanes.step.mark())
        for (slab, begin, _), room in zip(sources, rooms, strict=True):
            visit.arrivals += slab.fetch_parts(room, begin)

    def _finish(
        self,
        model: ShardedModel,
        visit: _Visit,
        by_unit: dict[int, list[Shard]],
        begun: set[int],
        factor: Tensor | None,
        doubles: _Doubles,
        going: deque[_Visit],
    ) -> None:
        """Step the elements of a visit and send them down again."""
        engine, trained = model.engine, visit.trained
        lanes = engine.lanes
        if not engine.land(visit.arrivals, lanes.step.wait):
            return
        with lanes.step.on():
            for key in list(visit.coming):
                visit.states[key] = visit.at_rest.slabs[key].unpacked(visit.coming.pop(key), visit.numel)
            stepped, step = self._run(visit, by_unit.get(id(trained), []), begun, factor, doubles)
            kept, event = trained.deliver(visit.master, visit.begin)
            visit.held.append(kept)
            visit.unit.published = lanes.step.mark()
            visit.down = event
            for key, staged in visit.states.items():
                visit.at_rest.slab(key, staged.dtype)
            for shard, state in stepped:
                self.optimizer.state[shard.tensor] = self._resting(shard, state)
            leaving: list[tuple[list[Tensor], Slab, int]] = []
            for key in list(visit.states):
                slab = visit.at_rest.slabs[key]
                leaving.append((slab.packed(visit.states.pop(key), visit.first, step), slab, visit.first))
            if not trained.shares_weights:
                leaving.append(([visit.master], trained.master, visit.begin))
            lanes.down.wait(lanes.step.mark())
            for parts, slab, begin in leaving:
                visit.held += parts
                visit.down = slab.put_parts(parts, begin, given=True)
        going.append(visit)
        if len(going) > 1:  # one behind, so that the next step does not wait for this one's way down
            lanes.step.wait(going.popleft().down)

    def _run(
        self, visit: _Visit, shards: Sequence[Shard], begun: set[int], factor: Tensor | None, doubles: _Doubles
    ) -> tuple[list[tuple[Shard, dict[str, Any]]], Tensor | None]:
        """Run the user's optimizer on what is there, with the hyperparameters of this step.

        Gives the shards whose last elements were here, with the states that the optimizer has for them now; and the count of
        steps, where states are coded.
        """
        grad = visit.grad if visit.grad.dtype == visit.master.dtype else visit.grad.to(visit.master.dtype)
        if factor is not None:
            grad.mul_(factor)
        one = doubles.next()
        pieces: list[tuple[Shard, Parameter, slice]] = []  # each with where it lies in the visit's states
        for shard in shards:
            first, last = max(shard.begin, visit.begin), min(shard.end, visit.end)
            if first >= last or not shard.trained.gradients.used[shard.index]:
                continue
            piece = Parameter(visit.master[first - visit.begin : last - visit.begin])
            piece.grad = grad[first - visit.begin : last - visit.begin]
            begin = visit.at_rest.footprint.place(first) - visit.first
            where = slice(begin, begin + last - first)
            if id(shard) in begun:
                whole = last - first == shard.numel
                scalars = self.optimizer.state[shard.tensor]
                one.state[piece] = {
                    key: visit.states[key][where] if key in visit.states else value if whole else _copy(value)
                    for key, value in scalars.items()
                }
            one.param_groups[shard.group]["params"].append(piece)
            pieces.append((shard, piece, where))
        with standing_in(one, lambda: [(id(shard.parameter), piece) for shard, piece, _ in pieces]):
            run_step(one, hooks=False)
        stepped = []
        for shard, piece, where in pieces:
            state = one.state[piece]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == piece.shape:
                    if key not in visit.states:
                        visit.states[key] = visit.master.new_zeros(visit.numel, dtype=value.dtype)
                    if value.data_ptr() != visit.states[key][where].data_ptr():
                        visit.states[key][where].copy_(value)
            if shard.end <= visit.end:
                stepped.append((shard, dict(state)))
        coded = visit.trained.codes_states
        return stepped, counted((one.state[piece] for _, piece, _ in pieces), visit.master.device) if coded else None

    @staticmethod
    def _resting(shard: Shard, state: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer's own dictionary holds: numbers as they are, tensors where they rest."""
        return {
            key: shard.stand_in(key) if key in shard.states and isinstance(value, Tensor) and value.ndim else value
            for key, value in state.items()
        }


class _Doubles:
    """The user's optimizer once more for each call of a step: as the step began, with empty groups and no hooks of its own,
    which ran once for the step. torch's own keep what a call counts with their parameters, so one double serves all calls.

    scale: by which its kernel divides gradients, or None.
    """

    def __init__(self, optimizer: Optimizer, before: Any, device: torch.device, scale: Tensor | None) -> None:
        self._before = before
        self._scale = scale
        self._found_inf = None if scale is None else torch.zeros((), device=device)
        self._kept = self._made() if is_torchs(optimizer) else None

    def next(self) -> Any:
        """For one call."""
        one = self._kept
        if one is None:
            return self._made()
        one.state.clear()
        for group in one.param_groups:
            group["params"] = []
        return one

    def _made(self) -> Any:
        one = double(self._before)
        one.grad_scale, one.found_inf = self._scale, self._found_inf
        return one


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
