"""A unit: the frozen and the trainable buffer of one module group, and the moves between their states.

    weights      RELEASED --gather--> GATHERING --arrive--> GATHERED --release--> RELEASED
    gradients    EMPTY --collect--> COLLECTING --reduce--> REDUCING --settle--> READY --drop--> EMPTY
                 EMPTY --reduce--> REDUCING, where no micro-batch is only collected

A unit whose weights never leave (whole on the gpu, or a single rank without offload) is GATHERED for good: gather and
release cost nothing, so that the schedule needs no second path. The unit knows lanes and collectives; it does not know which
unit comes next (schedule), when autograd calls (hooks), or what an optimizer is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor, nn

from ..errors import UnitStateError
from ..offload.store import Store
from .collectives import Ranks
from .flat import FlatBuffer
from .layout import Piece
from .plan import Plan, Tier
from .streams import Lanes


class Weights(Enum):
    RELEASED = auto()
    GATHERING = auto()
    GATHERED = auto()


class Grads(Enum):
    EMPTY = auto()
    COLLECTING = auto()
    REDUCING = auto()
    READY = auto()


_WEIGHT_MOVES = {
    Weights.RELEASED: {Weights.GATHERING},
    Weights.GATHERING: {Weights.GATHERED},
    Weights.GATHERED: {Weights.RELEASED, Weights.GATHERING},  # GATHERING again: the schedule asks for a second copy
}
_GRAD_MOVES = {
    Grads.EMPTY: {Grads.COLLECTING, Grads.REDUCING, Grads.EMPTY},
    Grads.COLLECTING: {Grads.REDUCING, Grads.COLLECTING, Grads.EMPTY},
    Grads.REDUCING: {Grads.READY, Grads.REDUCING, Grads.COLLECTING, Grads.EMPTY},
    Grads.READY: {Grads.COLLECTING, Grads.REDUCING, Grads.EMPTY},
}


@dataclass(frozen=True)
class Engine:
    """What every unit of a model shares: the ranks, the lanes, the store of each tier, the dtype gradients are summed in."""

    ranks: Ranks
    lanes: Lanes
    stores: Mapping[Tier, Store]
    reduce_dtype: torch.dtype
    reductions: ReductionsInFlight


class ReductionsInFlight:
    """The scratch memory of reductions that the device has not finished, oldest first, over all units of a model.

    The host enqueues a whole backward before the device has run it, so it cannot wait for a reduction to end. Instead the
    computation waits, on the device, for the oldest ones when all together would take more than BUDGET bytes: from then on
    their memory may be written again. Adapters stay far below that, and nothing ever waits.
    """

    BUDGET = 256 << 20

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._held: list[tuple[torch.cuda.Event, Tensor]] = []
        # False keeps all of them to the end of the backward: see Schedule._agree_on_window.
        self.bounded = True

    @property
    def nbytes(self) -> int:
        return sum(scratch.nbytes for _, scratch in self._held)

    def make_room(self, nbytes: int) -> None:
        """Before another reduction takes `nbytes` of scratch memory."""
        while self.bounded and self._held and self.nbytes + nbytes > self.BUDGET:
            self._drop_oldest()

    def add(self, event: torch.cuda.Event | None, scratch: Tensor) -> None:
        if event is not None:  # on a CPU the reduction is over, and its scratch memory may go at once
            self._held.append((event, scratch))

    def clear(self) -> None:
        while self._held:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        event, _ = self._held.pop(0)
        self._lanes.compute_waits(event)


class Unit:
    """One module group.

    entries:   the modules that need the weights when they run.
    frozen:    bytes of any dtypes, or None. trainable: numbers of one dtype, or None.
    gradients: of the trainable buffer, or None.
    """

    def __init__(
        self,
        name: str,
        entries: list[nn.Module],
        plan: Plan,
        engine: Engine,
        frozen: FlatBuffer | None,
        trainable: FlatBuffer | None,
        gradients: Gradients | None,
    ) -> None:
        self.name = name
        self.entries = entries
        self.plan = plan
        self.frozen = frozen
        self.trainable = trainable
        self.gradients = gradients
        self._engine = engine
        self._parts = [b for b in (frozen, trainable) if b is not None and b.leaves]
        self._arrived: torch.cuda.Event | None = None
        self.state = Weights.GATHERED

    @property
    def leaves(self) -> bool:
        """Whether there is anything to gather: False when every weight stays whole on the gpu."""
        return bool(self._parts)

    def _move(self, state: Weights) -> None:
        if state not in _WEIGHT_MOVES[self.state]:
            raise UnitStateError(
                f"unit {self.name}: {self.state.name} does not lead to {state.name}. This is a fault of "
                "shardwise; please report it with the model's class."
            )
        self.state = state

    def gather(self) -> None:
        """Enqueue the collectives that make the weights whole, on the gather lane; `arrive` before they are read."""
        lane, ranks = self._engine.lanes.gather, self._engine.ranks
        again = self.state is Weights.GATHERED
        self._move(Weights.GATHERING)
        with lane.on():
            for part in self._parts:
                if not again:
                    part.expand()
                source = part.shard
                if part.placement.tier is not Tier.GPU:
                    # Straight into this rank's slice of the whole: no staging buffer on the device.
                    source = part.own_slice
                    part.store.fetch(part.shard, source)
                ranks.all_gather(part.whole, source)
            self._arrived = lane.mark()

    def arrive(self) -> None:
        """The computation waits for the gather; from here on the parameters may be read."""
        if self.state is Weights.GATHERED:
            return
        self._move(Weights.GATHERED)
        self._engine.lanes.compute_waits(self._arrived)
        for part in self._parts:
            part.unguard()

    def release(self) -> None:
        """Give the storage of the whole back, once the computation enqueued so far has read it."""
        lanes = self._engine.lanes
        if not self._parts:
            return
        if self.state is Weights.GATHERING:
            self.arrive()
        self._move(Weights.RELEASED)
        done = lanes.mark_compute()
        with lanes.gather.on():
            lanes.gather.wait(done)
            for part in self._parts:
                part.guard()
                part.collapse()

    # After an optimizer step.

    def publish(self) -> None:
        """Bring the updated masters into the weights that compute: a local cast, and an all-gather if those are whole."""
        buffer, gradients = self.trainable, self.gradients
        if buffer is None or gradients is None:
            return
        if not gradients.shares_weights:
            target = buffer.shard if self.plan.parameter.sharded else gradients.region(buffer.whole)
            master = gradients.master
            if master.device.type == "cpu" and target.device.type == "cuda":
                master = master.to(target.device, non_blocking=True)
            elif target.device.type == "cpu" and master.device.type == "cuda":
                master = master.to(target.dtype)
            target.copy_(master, non_blocking=True)
        if self.plan.optimizer.sharded and not self.plan.parameter.sharded:
            self._engine.ranks.all_gather(buffer.whole, buffer.own_slice)


class Gradients:
    """The gradients of one trainable buffer and the fp32 masters that they will change.

    master: (n,) at rest on plan.optimizer.tier, where n is the shard's or, with a whole optimizer, the whole buffer's size.
    shares_weights: the master is the computing weights themselves, because dtype and place agree; it costs nothing.
    used:   per parameter, whether a gradient has arrived on this rank since the last step.
    """

    def __init__(self, buffer: FlatBuffer, plan: Plan, engine: Engine, master: Tensor, shares_weights: bool) -> None:
        self.buffer = buffer
        self.plan = plan
        self.master = master
        self.shares_weights = shares_weights
        self._engine = engine
        self.state = Grads.EMPTY
        self.used = [False] * len(buffer.members)
        self.pending: set[int] = set()
        self._whole: Tensor | None = None  # this rank's own sum over micro-batches, not yet reduced
        self._shard: Tensor | None = None  # reduced, master's dtype, on the device
        self._host: Tensor | None = None  # the same at rest, when the plan offloads it
        self._host_filled = False

    def _move(self, state: Grads) -> None:
        if state not in _GRAD_MOVES[self.state]:
            raise UnitStateError(
                f"gradients of {self.buffer.members[0].name}...: {self.state.name} does not lead to "
                f"{state.name}. This is a fault of shardwise; please report it."
            )
        self.state = state

    def region(self, whole: Tensor) -> Tensor:
        """The part of a whole flat tensor that this rank's optimizer works on."""
        n = self.buffer.layout.shard_numel
        rank = self._engine.ranks.rank
        return whole[rank * n : (rank + 1) * n] if self.plan.optimizer.sharded else whole

    def pieces(self) -> tuple[Piece, ...]:
        """Which parts of which parameters lie in `master`, in order."""
        if self.plan.optimizer.sharded:
            return self.buffer.layout.pieces(self._engine.ranks.rank)
        return tuple(Piece(i, 0, slot.offset, slot.numel) for i, slot in enumerate(self.buffer.layout.slots))

    # During a backward.

    def expect(self) -> None:
        """A backward begins: no parameter has sent its gradient yet."""
        self.pending = set(range(len(self.buffer.members)))

    def note(self, index: int) -> bool:
        """Parameter `index` has its gradient. True when it was the last of the unit."""
        self.used[index] = True
        self.pending.discard(index)
        return not self.pending

    def collect(self) -> None:
        """Add this rank's gradients to its own sum and drop them from the parameters. No communication."""
        self._move(Grads.COLLECTING)
        partial = self._take()
        if self._whole is None:
            self._whole = partial.to(self.master.dtype)
        else:
            self._whole.add_(partial)

    def reduce(self) -> None:
        """Average over the ranks what this rank has, and add this rank's region to what is already there.

        Runs on the reduce lane. Parameters without a gradient count as zeros, so that every rank may call it.
        """
        self._move(Grads.REDUCING)
        engine = self._engine
        engine.reductions.make_room(self.scratch_nbytes)
        partial = self._take()
        if self._whole is not None:
            partial = (
                partial.add_(self._whole)
                if partial.dtype == self._whole.dtype
                else self._whole.add_(partial).to(partial.dtype)
            )
            self._whole = None
        engine.lanes.reduce.wait(engine.lanes.mark_compute())
        with engine.lanes.reduce.on():
            if self.plan.optimizer.sharded:
                out = self.region(partial)
                engine.ranks.reduce_scatter(partial, out)
            else:
                out = partial
                engine.ranks.all_reduce_gradient(out)
            if self._shard is not None:
                self._shard.add_(out)
            elif out.dtype == self.master.dtype and not self.plan.optimizer.sharded:
                self._shard = out
            else:
                self._shard = out.to(self.master.dtype, copy=True)
            engine.reductions.add(engine.lanes.reduce.mark(), partial)

    def settle(self) -> None:
        """The backward of the last micro-batch is over: move the reduced gradient to where the plan rests it."""
        if self._shard is None:
            return
        self._move(Grads.READY)
        tier = self.plan.optimizer.tier
        if tier is Tier.GPU:
            return
        lanes, store = self._engine.lanes, self._engine.stores[tier]
        if self._host is None:
            self._host = store.allocate(self._shard.numel(), self._shard.dtype)
        shard, self._shard = self._shard, None
        lanes.copy.wait(lanes.reduce.mark())
        with lanes.copy.on():
            if self._host_filled:
                earlier = torch.empty_like(shard)
                store.fetch(self._host, earlier)
                shard.add_(earlier)
            store.put(shard, self._host)
            # The shard is the reduce lane's memory: that lane may reuse it only after the copy.
            done = lanes.copy.mark()
        lanes.reduce.wait(done)
        self._host_filled = True

    def _take(self) -> Tensor:
        """This backward's gradients as one flat tensor in the reduce dtype, zeros where there is none."""
        flat = torch.zeros(self.buffer.layout.numel, dtype=self._reduce_dtype, device=self.buffer.whole.device)
        targets, sources = [], []
        for member, target in zip(self.buffer.members, self.buffer.slices(flat), strict=True):
            grad = member.parameter.grad
            if grad is not None:
                targets.append(target)
                sources.append((grad.to_dense() if grad.is_sparse else grad).reshape(-1))
                member.parameter.grad = None
        if targets:
            torch._foreach_copy_(targets, sources)
        return flat

    @property
    def scratch_nbytes(self) -> int:
        """Bytes that a reduction of this buffer takes besides its result."""
        return self.buffer.layout.numel * self._reduce_dtype.itemsize

    @property
    def _reduce_dtype(self) -> torch.dtype:
        return torch.float64 if self.master.dtype == torch.float64 else self._engine.reduce_dtype

    # For the optimizer.

    @property
    def at_rest(self) -> Tensor | None:
        """The reduced gradient beside `master`, or None if there is none."""
        if self.state is not Grads.READY:
            return None
        return self._shard if self.plan.optimizer.tier is Tier.GPU else self._host

    def forget(self, indices: Collection[int]) -> None:
        """Forget the gradients of some parameters: another optimizer still needs the others'."""
        at_rest = self.at_rest
        if at_rest is not None:
            for piece in self.pieces():
                if piece.slot in indices:
                    at_rest[piece.in_shard : piece.in_shard + piece.numel].zero_()
        for index in indices:
            self.used[index] = False
            if self._whole is not None:
                self.buffer.slices(self._whole)[index].zero_()
        if not any(self.used):
            self.drop()

    def drop(self) -> None:
        """Forget every gradient since the last step."""
        self._move(Grads.EMPTY)
        self._whole = self._shard = None
        self._host_filled = False
        self.used = [False] * len(self.used)
        for member in self.buffer.members:
            member.parameter.grad = None

    @property
    def nbytes(self) -> dict[Tier, int]:
        """Bytes that gradients hold at this moment, by tier."""
        found = {Tier.GPU: sum(t.nbytes for t in (self._whole, self._shard) if t is not None)}
        if self._host is not None:
            found[Tier.CPU] = self._host.nbytes
        return {tier: count for tier, count in found.items() if count}
