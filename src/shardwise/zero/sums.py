"""What has been added up of a unit's gradients since the last step, as flat tensors, and where it rests.

    own    this rank's own sum over micro-batches that nobody has averaged yet
    rest   averaged: beside the master on the device, or in host memory where the optimizer rests off the device

With the optimizer off the device, a reduced gradient leaves at once, in the dtype it was summed in, while the backward
goes on. Its squared norm is taken before it leaves, so that clipping reads nothing back. Micro-batches are added up where
the gradient rests: it comes back up for the step, and before that only to be measured, where the step clips.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..offload.store import Arrival, Done, Slab
from ..plan.layout import Region
from ..plan.plan import Tier
from .engine import Engine
from .flat import FlatBuffer
from .norms import measurable


def squared_norm(values: Tensor, device: torch.device | None = None) -> Tensor:
    """The sum of squares, a scalar in fp32 (fp64 of fp64) on `device`, or where `values` are; see `measurable`."""
    norm: Tensor = torch.linalg.vector_norm(measurable(values, device or values.device))
    return norm.square()


class Sums:
    """Of one buffer of trained weights.

    region:  the part of the buffer that this rank's optimizer works on; what is averaged has its size.
    dtype:   the master's, in which micro-batches are added up.
    on_host: whether what is averaged leaves for host memory.
    square:  the squared 2-norm of this rank's gradient, a scalar on the device that the backward has measured; None for a sum
             of several micro-batches in host memory, and for a gradient that was changed since.
    factor:  by which the step multiplies what is at rest; scaled: whether that carries the loss scale; loss_scale: that of the
             last backward.
    """

    def __init__(
        self, buffer: FlatBuffer, region: Region, dtype: torch.dtype, engine: Engine, *, on_host: bool
    ) -> None:
        self.region = region
        self.dtype = dtype
        self.reduce_dtype = torch.float64 if dtype == torch.float64 else engine.reduce_dtype
        self.on_host = on_host
        self.own: Tensor | None = None
        self.square: Tensor | None = None
        self.factor: Tensor | None = None
        self.scaled = True
        self.loss_scale = 1.0
        self._buffer = buffer
        self._engine = engine
        self._shard: Tensor | None = None  # averaged, on the device
        self._host: Slab | None = None  # averaged, in host memory
        self._host_filled = False
        self._changes = 0

    # During a backward.

    def expect(self, boundary: bool) -> None:
        """Gradients are about to be reduced.

        Here, not in the backward: to pin memory, and to give it back, may hold the host until the device is idle. In a
        backward that could be for ever: a reduction of ranks that need a gather first which this rank has not issued.
        """
        if self.on_host and self._host_filled:
            self._engine.stores.cpu.expect(self.region.numel * self.reduce_dtype.itemsize)
        elif self.on_host:
            self._room(boundary)

    def collect(self, partial: Tensor) -> None:
        """Add a micro-batch to this rank's own sum. partial: (layout.numel,)."""
        self.changed()
        if self.own is None:
            self.own = partial.to(self.dtype)
        else:
            self.own.add_(partial)

    def with_own(self, partial: Tensor) -> Tensor:
        """`partial` and this rank's own sum, which is gone then."""
        self.changed()
        own, self.own = self.own, None
        if own is None:
            return partial
        return partial.add_(own) if partial.dtype == own.dtype else own.add_(partial).to(partial.dtype)

    def add(self, out: Tensor, *, boundary: bool, measured: bool) -> Arrival:
        """Add a reduced gradient to what rests, on the reduce lane. Gives that after which `out` may be written again.

        boundary: it is the last before a step. measured: whether the step will ask for `square`.
        """
        if self.on_host:
            return self._send(out, boundary)
        if self._shard is not None:
            self._shard.add_(out)
        elif out.dtype == self.dtype and self.region.rank is None:
            self._shard = out
        else:
            self._shard = out.to(self.dtype, copy=True)
        self.square = squared_norm(self._shard) if boundary and measured else None
        return Done(self._engine.lanes.reduce.mark())

    def _send(self, out: Tensor, boundary: bool) -> Arrival:
        lanes, store = self._engine.lanes, self._engine.stores.cpu
        first = not self._host_filled
        self.square = squared_norm(out) if first and boundary else None
        if first:
            host = self._room(boundary)
            self._host_filled = True
            lanes.down.wait(lanes.reduce.mark())
            return host.put(out)
        assert self._host is not None
        if (
            self._host.dtype != self.dtype
        ):  # the unit is reduced twice in one backward, as under re-entrant checkpointing
            lanes.synchronize()
            wider = store.allocate(out.numel(), self.dtype, self._name)
            wider.tensor.copy_(self._host.tensor)
            self._host = wider
        return store.add(out, self._host, lanes.reduce.mark())

    def _room(self, boundary: bool) -> Slab:
        """Host memory for the first gradient since a step, in the dtype in which it will leave."""
        # A sum of several needs the master's dtype; a single one is exact in the dtype it was summed in.
        return self._host_of(self.reduce_dtype if boundary else self.dtype)

    def _host_of(self, dtype: torch.dtype) -> Slab:
        if self._host is None or self._host.dtype != dtype:
            self._host = None  # the old slab goes before the new one comes
            self._host = self._engine.stores.cpu.allocate(self.region.numel, dtype, self._name)
        return self._host

    @property
    def _name(self) -> str:
        return self._buffer.members[0].name

    # At rest.

    @property
    def averaged(self) -> bool:
        """Whether anything rests, or is on its way."""
        return self._shard is not None or self._host_filled

    @property
    def rest(self) -> Tensor | None:
        """What is averaged, which may be on its way."""
        return self._shard if self._host is None or not self._host_filled else self._host.tensor

    @property
    def host(self) -> Slab | None:
        """What is averaged, if it is in host memory."""
        return self._host if self._host_filled else None

    def arrived(self) -> Tensor | None:
        """What is averaged, there when this returns."""
        if self._host_filled:
            self._engine.lanes.synchronize()
            self._engine.stores.cpu.drain()
        return self.rest

    def changed(self) -> None:
        """Somebody writes into what rests: what was known of it no longer holds."""
        self.square = None
        self._changes += 1

    @property
    def version(self) -> tuple[int, int]:
        """Differs where what rests may."""
        return self._changes, 0 if self.rest is None else self.rest._version

    def multiply(self, factor: Tensor) -> None:
        """Apply a factor to what rests, besides that which waits for the step. factor: a scalar on any device."""
        rest = self.arrived()
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
    def parted(self) -> bool:
        """Whether each rank keeps a part of what is averaged."""
        return self.region.rank is not None and self._engine.ranks.owners.size > 1

    @property
    def is_own(self) -> bool:
        """Whether all that there is are this rank's own sums of micro-batches."""
        return self.own is not None and self.rest is None

    def parts(self, index: int) -> list[Tensor]:
        """What rests of a parameter's gradient on this rank, to be read and changed; flat."""
        self.apply_factor()
        rest = self.arrived()
        if rest is None:
            return []
        return [rest[p.in_shard : p.in_shard + p.numel] for p in self.region.pieces if p.slot == index]

    @torch.no_grad()
    def whole(self) -> Tensor:
        """All gradients of the buffer, flat, on the device. Collective if `parted`, unless all of it `is_own`.

        It may be what the engine itself keeps; `take_back` must be told where it was written.
        """
        if self.own is not None and self.is_own:
            return self.own
        self.apply_factor()
        rest = self.arrived()
        assert rest is not None
        whole = rest.to(self._buffer.whole.device)
        if self.parted:
            part, whole = whole, torch.empty(self.region.layout.numel, dtype=whole.dtype, device=whole.device)
            self._engine.ranks.owners.all_gather(whole, part)
        if self.own is not None:
            # The average over the ranks of sums with it is the average of the sums plus it.
            self.own.add_(whole)
            self._shard, self._host_filled = None, False
            return self.own
        return whole

    @torch.no_grad()
    def take_back(self, whole: Tensor) -> None:
        """`whole` was written: let it be the gradient."""
        rest = self.rest
        if rest is not None and rest.data_ptr() != whole.data_ptr() and whole is not self.own:
            rest.copy_(whole[self.region.interval])
        self.changed()

    @torch.no_grad()
    def put(self, index: int, gradient: Tensor) -> None:
        """Let this be the gradient of one parameter, equal on all ranks. gradient: in the parameter's shape, on any device."""
        flat = gradient.detach().reshape(-1)
        self.apply_factor()
        if self.own is not None:
            self._buffer.slices(self.own)[index].copy_(flat)
        rest = self.arrived()
        if rest is None and self.own is None:
            rest = self.fill()
        for piece in self.region.pieces if rest is not None else ():
            if piece.slot == index:
                assert rest is not None
                target = rest[piece.in_shard : piece.in_shard + piece.numel]
                if self.own is None:
                    target.copy_(flat[piece.in_slot : piece.in_slot + piece.numel])
                else:
                    target.zero_()
        self.changed()

    def fill(self) -> Tensor:
        """Zeros where the plan rests gradients."""
        if not self.on_host:
            self._shard = torch.zeros(self.region.numel, dtype=self.dtype, device=self._buffer.whole.device)
            return self._shard
        host = self._host_of(self.dtype)
        self._engine.lanes.synchronize()  # the last step may still be reading it
        host.tensor.zero_()
        self._host_filled = True
        return host.tensor

    def zero(self, indices: Collection[int]) -> None:
        """Make the gradients of some parameters zero, where they have any."""
        rest = self.arrived()
        if rest is not None:
            for piece in self.region.pieces:
                if piece.slot in indices:
                    rest[piece.in_shard : piece.in_shard + piece.numel].zero_()
        if self.own is not None:
            for index in indices:
                self._buffer.slices(self.own)[index].zero_()
        self.changed()

    def rest_on_device(self, master: Slab, *, keep: bool) -> None:
        """From now on what is averaged stays beside `master`, on the device. keep: what rests now goes there."""
        rest = self.arrived()
        if keep and rest is not None:
            self._shard = rest.to(master.tensor.device, master.dtype, copy=True)
        self.on_host = False
        self._host, self._host_filled = None, False
        self.changed()

    def drop(self) -> None:
        """Forget all."""
        self.own = self._shard = self.factor = None
        self._host_filled = False
        self.scaled = True
        self.changed()

    @property
    def nbytes(self) -> dict[Tier, int]:
        """Bytes held at this moment, by tier."""
        found = {Tier.GPU: sum(t.nbytes for t in (self.own, self._shard) if t is not None)}
        if self._host is not None:
            found[Tier.CPU] = self._host.nbytes
        return {tier: count for tier, count in found.items() if count}
