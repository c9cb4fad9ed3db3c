"""The gradients of one flat buffer, and the fp32 masters that they will change.

    EMPTY --collect--> COLLECTING --reduce--> REDUCING --settle--> READY --drop--> EMPTY
    EMPTY --reduce--> REDUCING, where no micro-batch is only collected
    EMPTY --put--> READY, where a script gives a gradient of its own

With the optimizer off the device, a reduced gradient leaves at once, in the dtype it was summed in, while the backward
goes on. Its squared norm is taken before it leaves, so that clipping reads nothing back. Micro-batches are added up where
the gradient rests: it never comes back up before the step.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import UnitStateError
from ..offload.store import Arrival, Done, Slab
from ..plan.layout import Piece
from ..plan.plan import Plan, Tier
from .engine import Engine
from .flat import FlatBuffer
from .guard import unasked
from .shown import Shown


class Grads(Enum):
    EMPTY = auto()
    COLLECTING = auto()
    REDUCING = auto()
    READY = auto()


_MOVES = {
    Grads.EMPTY: {Grads.COLLECTING, Grads.REDUCING, Grads.READY, Grads.EMPTY},
    Grads.COLLECTING: {Grads.REDUCING, Grads.COLLECTING, Grads.EMPTY},
    Grads.REDUCING: {Grads.READY, Grads.REDUCING, Grads.COLLECTING, Grads.EMPTY},
    Grads.READY: {Grads.COLLECTING, Grads.REDUCING, Grads.EMPTY},
}


def squared_norm(values: Tensor | None) -> Tensor:
    """The sum of squares, a scalar in fp32 (fp64 of fp64) where `values` are."""
    assert values is not None
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return norm.square()


class Gradients:
    """The gradients of one trainable buffer.

    master: (n,) at rest on plan.optimizer.tier, where n is the shard's or, with a whole optimizer, the whole buffer's size.
    shares_weights: the master is the computing weights themselves, because dtype and place agree; it costs nothing.
    states: what the optimizer keeps beside a master that is not in place, by key ("exp_avg"), each (n,).
    used:   per parameter, whether a gradient has arrived on this rank since the last step.
    """

    def __init__(self, buffer: FlatBuffer, plan: Plan, engine: Engine, master: Slab, shares_weights: bool) -> None:
        self.buffer = buffer
        self.plan = plan
        self.master = master
        self.shares_weights = shares_weights
        self.states: dict[str, Slab] = {}
        self._engine = engine
        self.state = Grads.EMPTY
        self.used = [False] * len(buffer.members)
        self.pending: set[int] = set()
        self._leaves = plan.optimizer.tier is not Tier.GPU
        self._own: Tensor | None = None  # this rank's own sum over micro-batches, not yet reduced
        self._shard: Tensor | None = None  # reduced, master's dtype, on the device
        self._host: Slab | None = None  # reduced, in host memory, when the plan offloads the optimizer
        self._host_filled = False
        self._square: Tensor | None = None
        # Whether the step will ask for `square`: set by the optimizer that clips.
        self.measured = self._leaves
        # By which the step multiplies what is at rest; whether that carries the loss scale; and that of the last backward.
        self.factor: Tensor | None = None
        self.scaled = True
        self.loss_scale = 1.0
        self._changes = 0
        self.shown = Shown(self, engine.norms)
        engine.norms.count(self)

    @property
    def name(self) -> str:
        return self.buffer.members[0].name

    @property
    def parameters(self) -> list[Parameter]:
        return [member.parameter for member in self.buffer.members]

    @property
    def in_place(self) -> bool:
        """Whether the optimizer can change the master where it rests; else it visits the device in the step."""
        return self.master.in_memory and (self.master.tier is Tier.GPU or self._engine.lanes.device.type == "cpu")

    def _move(self, state: Grads) -> None:
        if state not in _MOVES[self.state]:
            raise UnitStateError(
                f"gradients of {self.name}...: {self.state.name} does not lead to "
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

    def expect(self, *, reduces: bool, boundary: bool) -> None:
        """A backward begins: no parameter has sent its gradient yet. reduces, boundary: whether it will be, and how."""
        self.shown.look(before_backward=True)
        self.apply_factor()
        self.pending = set(range(len(self.buffer.members)))
        if self._leaves and reduces:
            # Here: to pin memory, and to give it back, may hold the host until the device is idle. In a backward that could be
            # for ever: a reduction of ranks that need a gather first which this rank has not issued.
            if self._host_filled:
                self._engine.stores.cpu.expect(self.master.numel * self._reduce_dtype.itemsize)
            else:
                self._room(boundary)

    def note(self, index: int) -> bool:
        """Parameter `index` has its gradient. True when it was the last of the unit."""
        self.used[index] = True
        self.pending.discard(index)
        return not self.pending

    def collect(self) -> None:
        """Add this rank's gradients to its own sum and drop them from the parameters. No communication."""
        self._move(Grads.COLLECTING)
        self.changed()
        partial = self._take()
        if self._own is None:
            self._own = partial.to(self.master.dtype)
        else:
            self._own.add_(partial)

    def reduce(self, boundary: bool = True) -> None:
        """Average over the ranks what this rank has, and add this rank's region to what is already there.

        boundary: this is the last micro-batch before a step.
        Runs on the reduce lane. Parameters without a gradient count as zeros, so that every rank may call it.
        """
        self._move(Grads.REDUCING)
        self.changed()
        engine, lanes = self._engine, self._engine.lanes
        engine.reductions.make_room(self.scratch_nbytes)
        partial = self._take()
        if self._own is not None:
            partial = (
                partial.add_(self._own)
                if partial.dtype == self._own.dtype
                else self._own.add_(partial).to(partial.dtype)
            )
            self._own = None
        lanes.reduce.wait(lanes.mark_compute())
        with lanes.reduce.on():
            if self.plan.optimizer.sharded:
                out = self.region(partial)
                engine.ranks.reduce_scatter(partial, out)
            else:
                out = partial
                engine.ranks.all_reduce_gradient(out)
            done: Arrival
            if self._leaves:
                done = self._send(out, boundary)
            else:
                self._keep(out)
                self._square = squared_norm(self._shard) if boundary and self.measured else None
                done = Done(lanes.reduce.mark())
        engine.reductions.add(done, partial)

    def _keep(self, out: Tensor) -> None:
        """Add a reduced gradient to the one on the device."""
        if self._shard is not None:
            self._shard.add_(out)
        elif out.dtype == self.master.dtype and not self.plan.optimizer.sharded:
            self._shard = out
        else:
            self._shard = out.to(self.master.dtype, copy=True)

    def _send(self, out: Tensor, boundary: bool) -> Arrival:
        """Let a reduced gradient leave for host memory. The event is that after which `out` may be written again."""
        lanes, store = self._engine.lanes, self._engine.stores.cpu
        first = not self._host_filled
        self._square = squared_norm(out) if first and boundary else None
        if first:
            host = self._room(boundary)
            self._host_filled = True
            lanes.down.wait(lanes.reduce.mark())
            return host.put(out)
        assert self._host is not None
        dtype = self.master.dtype
        if self._host.dtype != dtype:  # the unit is reduced twice in one backward, as under re-entrant checkpointing
            lanes.synchronize()
            wider = store.allocate(out.numel(), dtype, self.name)
            wider.tensor.copy_(self._host.tensor)
            self._host = wider
        return store.add(out, self._host, lanes.reduce.mark())

    def _room(self, boundary: bool) -> Slab:
        """Host memory for the first gradient since a step, in the dtype in which it will leave."""
        # A sum of several needs the master's dtype; a single one is exact in the dtype it was summed in.
        dtype = self._reduce_dtype if boundary else self.master.dtype
        if self._host is None or self._host.dtype != dtype:
            self._host = None  # the old slab goes before the new one comes
            self._host = self._engine.stores.cpu.allocate(self.master.numel, dtype, self.name)
        return self._host

    def settle(self) -> None:
        """The backward of the last micro-batch is over: the gradient is where the plan rests it, or on its way."""
        if self._shard is not None or self._host_filled:
            self._move(Grads.READY)

    def _take(self) -> Tensor:
        """This backward's gradients as one flat tensor in the reduce dtype, zeros where there is none."""
        flat = torch.empty(self.buffer.layout.numel, dtype=self._reduce_dtype, device=self.buffer.whole.device)
        slices, gaps = self.buffer.slices_and_gaps(flat)
        targets, sources = [], []
        empty = list(gaps)
        with unasked():
            for member, target in zip(self.buffer.members, slices, strict=True):
                grad = member.parameter.grad
                if grad is not None:
                    targets.append(target)
                    sources.append((grad.to_dense() if grad.is_sparse else grad).reshape(-1))
                    member.parameter.grad = None
                else:
                    empty.append(target)
        # Zeros only where nothing is copied: filling everything would write as many bytes as the copy does.
        if empty:
            torch._foreach_zero_(empty)
        if targets:
            torch._foreach_copy_(targets, sources)
        share = self._engine.share.value
        return flat if share == 1.0 else flat.mul_(share)

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
        """The reduced gradient beside the master, or None if there is none. On the host, see `Stores.drain` first."""
        return self._rest if self.state is Grads.READY else None

    @property
    def dtype_at_rest(self) -> torch.dtype | None:
        return None if self._rest is None else self._rest.dtype

    @property
    def host(self) -> Slab | None:
        """The reduced gradient in host memory, if it is there."""
        return self._host if self.state is Grads.READY and self._host_filled else None

    @property
    def square(self) -> Tensor | None:
        """The squared 2-norm of this rank's gradient, a scalar on the device that the backward has measured.

        None for a sum of several micro-batches in host memory, for a gradient that was changed since, and where it was not
        `measured`.
        """
        return self._square if self.state is Grads.READY else None

    def changed(self) -> None:
        """Somebody wrote into `at_rest`: what was known of it no longer holds."""
        self._square = None
        self._changes += 1

    @property
    def version(self) -> tuple[int, int]:
        """Differs where what is at rest may."""
        return self._changes, 0 if self._rest is None else self._rest._version

    def multiply(self, factor: Tensor) -> None:
        """Apply a factor to what is at rest, besides that which waits for the step. factor: a scalar on any device."""
        rest = self._arrived()
        if rest is not None:
            rest.mul_(factor.to(rest.device))
            self.changed()

    def apply_factor(self) -> None:
        """Multiply now by what would wait for the step."""
        factor, self.factor = self.factor, None
        if factor is not None:
            self.multiply(factor)

    def stepped(self) -> None:
        """A step has read the gradient in place, and left it multiplied by all that it was to be multiplied by."""
        self.factor, self.scaled = None, False
        self.changed()

    # For scripts, by way of `shown`.

    @property
    def _rest(self) -> Tensor | None:
        return self._shard if self._host is None or not self._host_filled else self._host.tensor

    def _arrived(self) -> Tensor | None:
        """What is at rest, there when this returns."""
        if self._host_filled:
            self._engine.lanes.synchronize()
            self._engine.stores.cpu.drain()
        return self._rest

    @property
    def parted(self) -> bool:
        """Whether each rank keeps a part of what is at rest."""
        return self.plan.optimizer.sharded and self._engine.ranks.world_size > 1

    @property
    def has_own(self) -> bool:
        """Whether there are sums of this rank's own that nobody has averaged yet."""
        return self._own is not None

    @property
    def is_own(self) -> bool:
        """Whether all that there is are this rank's own sums of micro-batches, which nobody has averaged yet."""
        return self._own is not None and self._rest is None

    def parts(self, index: int) -> list[Tensor]:
        """What is at rest of a parameter's gradient on this rank, to be read and changed; flat."""
        self.apply_factor()
        rest = self._arrived()
        if rest is None or not self.used[index]:
            return []
        return [rest[p.in_shard : p.in_shard + p.numel] for p in self.pieces() if p.slot == index]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """All gradients of the buffer, flat, on the device. Collective if `parted`, unless all of it `is_own`.

        It may be what the engine itself keeps; `take_back` must be told where it was written.
        """
        if self.is_own:
            assert self._own is not None
            return self._own
        self.apply_factor()
        rest = self._arrived()
        assert rest is not None
        whole = rest.to(self.buffer.whole.device)
        if self.parted:
            part, whole = whole, torch.empty(self.buffer.layout.numel, dtype=whole.dtype, device=whole.device)
            self._engine.ranks.all_gather(whole, part)
        if self._own is not None:
            # The average over the ranks of sums with it is the average of the sums plus it.
            self._own.add_(whole)
            self._shard, self._host_filled = None, False
            return self._own
        return whole

    @torch.no_grad()
    def take_back(self, whole: Tensor) -> None:
        """`whole` was written: let it be the gradient."""
        rest = self._rest
        if rest is not None and rest.data_ptr() != whole.data_ptr() and whole is not self._own:
            rest.copy_(self.region(whole))
        self.changed()

    @torch.no_grad()
    def put(self, index: int, gradient: Tensor) -> None:
        """Let this be the gradient of one parameter, equal on all ranks. gradient: in the parameter's shape, on any device."""
        flat = gradient.detach().reshape(-1)
        self.apply_factor()
        self.used[index] = True
        if self._own is not None:
            self.buffer.slices(self._own)[index].copy_(flat)
        rest = self._arrived()
        if rest is None and self._own is None:
            rest = self._rest_made()
            self._move(Grads.READY)
        for piece in self.pieces() if rest is not None else ():
            if piece.slot == index:
                assert rest is not None
                target = rest[piece.in_shard : piece.in_shard + piece.numel]
                if self._own is None:
                    target.copy_(flat[piece.in_slot : piece.in_slot + piece.numel])
                else:
                    target.zero_()
        self.changed()

    def _rest_made(self) -> Tensor:
        """Zeros where the plan rests gradients."""
        numel, dtype = self.master.numel, self.master.dtype
        if not self._leaves:
            self._shard = torch.zeros(numel, dtype=dtype, device=self.buffer.whole.device)
            return self._shard
        if self._host is None or self._host.dtype != dtype:
            self._host = self._engine.stores.cpu.allocate(numel, dtype, self.name)
        self._engine.lanes.synchronize()  # the last step may still be reading it
        self._host.tensor.zero_()
        self._host_filled = True
        return self._host.tensor

    def forget(self, indices: Collection[int]) -> None:
        """Forget the gradients of some parameters: another optimizer still needs the others'."""
        for index in indices:
            self.used[index] = False
        if not any(self.used):
            self.drop()
            return
        self.shown.hide_only(indices)
        self.zero(indices)

    def zero(self, indices: Collection[int]) -> None:
        """Make the gradients of some parameters zero, where they have any."""
        rest = self._arrived()
        if rest is not None:
            for piece in self.pieces():
                if piece.slot in indices:
                    rest[piece.in_shard : piece.in_shard + piece.numel].zero_()
        if self._own is not None:
            for index in indices:
                self.buffer.slices(self._own)[index].zero_()
        self.changed()

    def rest_on_device(self, master: Slab) -> None:
        """From now on master, states and gradients stay on the device. Between steps only."""
        rest = self._arrived()
        if self.state is Grads.READY and rest is not None:
            self._shard = rest.to(master.tensor.device, master.dtype, copy=True)
        self.master = master
        self.states = {}
        self._leaves = False
        self._host, self._host_filled = None, False
        self.changed()

    def drop(self) -> None:
        """Forget every gradient since the last step."""
        self._move(Grads.EMPTY)
        self.shown.hide()
        self._own = self._shard = self.factor = None
        self._host_filled = False
        self.scaled = True
        self.changed()
        self.used = [False] * len(self.used)

    @property
    def nbytes(self) -> dict[Tier, int]:
        """Bytes that gradients hold at this moment, by tier."""
        found = {Tier.GPU: sum(t.nbytes for t in (self._own, self._shard) if t is not None)}
        if self._host is not None:
            found[Tier.CPU] = self._host.nbytes
        return {tier: count for tier, count in found.items() if count}
