"""What this rank holds of a run's tensors, as intervals of named parameters: the engine's side of a checkpoint.

A checkpoint must not know how masters, frozen weights and optimizer states rest. Here each is a list of intervals, whatever
the stage, the tier and the number of ranks:

    trained/q.lora_A [0, 4096)        the fp32 master                       one per parameter that is trained
    frozen/q.weight [65536, 131072)   in the dtype that it computes in
    exp_avg/q.lora_A [0, 4096)        an optimizer's state of that parameter

`read` gives a copy on the CPU and `write` takes one; nothing else of the engine shows. Where every rank holds the same
(whole placements), `share` cuts the list so that the ranks together have each element once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..offload.nvme import fetch_part, put_part
from ..offload.store import Slab
from . import publishing
from .optimizer import ShardedOptimizer
from .sharded import ShardedModel
from .shards import Shard

# Numbers of elements at which `share` may cut: bytes stay in words of 8, whatever the dtype.
_CUT = 64
# The 0-d states that live beside their parameter only where a kernel on the device counts with them.
_COUNTS = ("step", "mu_product")
# How an optimizer computes belongs to the machine that it runs on, not to the checkpoint.
_MACHINE = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class Rest:
    """Elements of a flat buffer from `begin` on, in memory or in a slab; dtype: what its bytes are, where it is of bytes."""

    flat: Tensor | Slab
    begin: int
    dtype: torch.dtype | None = None

    def _range(self, first: int, numel: int) -> tuple[int, int]:
        size = 1 if self.dtype is None else self.dtype.itemsize
        return self.begin + first * size, numel * size

    def look(self, first: int, numel: int) -> Tensor:
        begin, count = self._range(first, numel)
        if isinstance(self.flat, Slab) and not self.flat.in_memory:
            found = fetch_part(self.flat, begin, count)
        else:
            flat = self.flat.tensor if isinstance(self.flat, Slab) else self.flat
            found = flat[begin : begin + count].detach()
        return found if self.dtype is None else found.view(self.dtype)

    @torch.no_grad()
    def write(self, first: int, values: Tensor) -> None:
        begin, _ = self._range(first, values.numel())
        if not isinstance(self.flat, Slab) or self.flat.in_memory:
            self.look(first, values.numel()).copy_(values)
            return
        if self.dtype is not None:
            values = values.to(self.dtype).contiguous().view(torch.uint8)
        put_part(self.flat, begin, values)


@dataclass(frozen=True)
class Interval:
    """Elements [begin, begin + numel) of one parameter in one role, on this rank.

    name:   the parameter's name in its model; shape: the whole parameter's.
    dtype:  in which it rests.
    copied: every rank holds this very interval.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    numel: int
    dtype: torch.dtype
    copied: bool
    _rest: Rest
    _first: int = 0

    def read(self) -> Tensor:
        """(numel,) on the CPU, the caller's own."""
        return self.look().to("cpu", copy=True)

    def look(self) -> Tensor:
        """(numel,) where it rests, or a copy of what rests on a drive, for reading at once: not to keep or to change."""
        return self._rest.look(self._first, self.numel)

    def write(self, values: Tensor) -> None:
        """Take (numel,) values of any floating dtype, or of this one. Raises StoreError where a drive fails."""
        self._rest.write(self._first, values)

    def part(self, begin: int, numel: int) -> Interval:
        """The elements [begin, begin + numel) of the parameter, which must lie in this interval."""
        return replace(self, begin=begin, numel=numel, _first=self._first + begin - self.begin)


def trained(model: ShardedModel) -> list[Interval]:
    """The masters of the trained weights on this rank."""
    found = []
    for unit in model.units:
        gradients = unit.gradients
        if gradients is not None:
            copied = not unit.plan.optimizer.sharded and model.ranks.world_size > 1
            for piece in gradients.pieces():
                slot = gradients.buffer.layout.slots[piece.slot]
                rest = Rest(gradients.master, piece.in_shard)
                dtype = gradients.master.dtype
                found.append(Interval(slot.name, slot.shape, piece.in_slot, piece.numel, dtype, copied, rest))
    return found


def frozen(model: ShardedModel) -> list[Interval]:
    """The frozen weights on this rank. They rest as bytes; the intervals are counted in elements of their own dtype."""
    found = []
    for buffer in (unit.frozen for unit in model.units if unit.frozen is not None):
        copied = not buffer.placement.sharded and model.ranks.world_size > 1
        for piece in buffer.layout.pieces(buffer.rank):
            slot, member = buffer.layout.slots[piece.slot], buffer.members[piece.slot]
            size = member.dtype.itemsize
            rest = Rest(buffer.own_slice if buffer.slab is None else buffer.slab, piece.in_shard, member.dtype)
            begin, numel = piece.in_slot // size, piece.numel // size
            found.append(Interval(slot.name, slot.shape, begin, numel, member.dtype, copied, rest))
    return found


def share(intervals: Sequence[Interval], rank: int, world_size: int) -> list[Interval]:
    """Of intervals that every rank holds, this rank's equal part; the others as they are."""
    copied = [interval for interval in intervals if interval.copied]
    total = sum(interval.numel for interval in copied)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    mine = [interval for interval in intervals if not interval.copied]
    start = 0
    for interval in copied:
        first, last = (_cut(bound - start, interval.numel) for bound in (low, high))
        if first < last:
            mine.append(interval.part(interval.begin + first, last - first))
        start += interval.numel
    return mine


def _cut(bound: int, numel: int) -> int:
    return min(numel, max(0, -(-bound // _CUT) * _CUT))


# Optimizer states.


@dataclass(frozen=True)
class StateOf:
    """The states of one parameter's interval: elementwise ones, and numbers (step counts) that go with all of it."""

    model: int  # which of the optimizer's models
    name: str
    elementwise: dict[str, Interval]
    numbers: dict[str, Any]


def states(stepper: ShardedOptimizer) -> list[StateOf]:
    """What the optimizer keeps for each interval on this rank; nothing for parameters that have taken no step."""
    found = []
    for number, name, shape, begin, copied, shard in _held(stepper):
        state = stepper.optimizer.state.get(shard.tensor)
        if not state:
            continue
        elementwise, numbers = {}, {}
        for key, value in state.items():
            if key in shard.gradients.states:
                slab = shard.gradients.states[key]
                rest = Rest(slab, shard.begin)
                elementwise[key] = Interval(name, shape, begin, shard.numel, slab.dtype, copied, rest)
            elif isinstance(value, Tensor) and value.ndim and value.numel() == shard.numel:
                flat = value.view(-1)
                elementwise[key] = Interval(name, shape, begin, flat.numel(), flat.dtype, copied, Rest(flat, 0))
            else:
                numbers[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        found.append(StateOf(number, name, elementwise, numbers))
    return found


def make_states(
    stepper: ShardedOptimizer,
    elementwise: Callable[[int, str], Mapping[str, torch.dtype]],
    numbers: Callable[[int, str], Mapping[str, Any]],
) -> None:
    """Replace all states by zeros of the given kinds, for `write`, and by the given numbers.

    elementwise: (model, name) -> {key: dtype}; numbers: (model, name) -> {key: value}. Both empty: no step was taken.
    """
    groups = {id(tensor): group for group in stepper.optimizer.param_groups for tensor in group["params"]}
    stepper.optimizer.state.clear()
    for shard in stepper.shards:
        shard.gradients.states.clear()
    for number, name, _, _, _, shard in _held(stepper):
        tensor = shard.tensor
        on_device = any(groups[id(tensor)].get(flag) for flag in ("fused", "capturable"))
        device = stepper.ranks.device
        state: dict[str, Any] = {}
        for key, value in numbers(number, name).items():
            state[key] = value
            if isinstance(value, Tensor):
                state[key] = value.to(torch.device("cpu") if key in _COUNTS and not on_device else device, copy=True)
        for key, dtype in elementwise(number, name).items():
            if shard.gradients.in_place:
                state[key] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
            else:
                state[key] = stepper.resting_state(shard, key, dtype)
        if state:
            stepper.optimizer.state[tensor] = state


def _held(stepper: ShardedOptimizer) -> Iterator[tuple[int, str, tuple[int, ...], int, bool, Shard]]:
    """(model, name, shape, begin, copied, what the optimizer holds) of each interval on this rank."""
    owners = {id(u.gradients): n for n, model in enumerate(stepper.models) for u in model.units if u.gradients}
    for shard in stepper.shards:
        gradients = shard.gradients
        slot = gradients.buffer.layout.slots[shard.index]
        copied = not gradients.plan.optimizer.sharded and stepper.ranks.world_size > 1
        yield owners[id(gradients)], slot.name, slot.shape, shard.in_slot, copied, shard


def groups(stepper: ShardedOptimizer) -> list[tuple[dict[str, Any], set[tuple[int, str]]]]:
    """Each parameter group: its settings, and the (model, name) of what this rank holds of it."""
    names = {id(shard.tensor): (number, name) for number, name, _, _, _, shard in _held(stepper)}
    return [
        (
            {key: value for key, value in group.items() if key != "params" and key not in _MACHINE},
            {names[id(tensor)] for tensor in group["params"]},
        )
        for group in stepper.optimizer.param_groups
    ]


# After.


def publish(model: ShardedModel) -> None:
    """The masters were written: bring them into the weights that compute. Collective."""
    with torch.no_grad():
        for unit in model.units:
            gradients = unit.gradients
            if gradients is None or gradients.in_place:
                unit.cast()
            elif not gradients.shares_weights:
                kept, event = unit.deliver(model.fetched(gradients.master), 0)
                model.engine.lanes.compute_waits(event)
                del kept
        for group in publishing.in_groups(model.units):
            publishing.send(group)
        publishing.arrive(model.units)
    model.settle()
