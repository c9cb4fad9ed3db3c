"""The trained weights of a unit: those that compute, their masters, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from ..offload.store import Slab
from ..plan.blueprint import Role
from ..plan.layout import Region
from ..plan.plan import Plan, Tier
from .engine import Engine
from .flat import FlatBuffer
from .gradients import Gradients
from .sums import Sums


class Trained:
    """What a unit has of its trained weights, of one dtype.

    buffer: the weights that compute. region: the part of it that this rank's optimizer works on.
    master: (region.numel,) at rest on plan.optimizer.tier.
    shares_weights: the master is the computing weights themselves, because dtype and place agree; it costs nothing.
    """

    def __init__(
        self, buffer: FlatBuffer, region: Region, plan: Plan, engine: Engine, master: Slab, shares_weights: bool
    ) -> None:
        self.buffer = buffer
        self.region = region
        self.plan = plan
        self.master = master
        self.shares_weights = shares_weights
        self._engine = engine
        self.sums = Sums(buffer, region, master.dtype, engine, on_host=plan.optimizer.tier is not Tier.GPU)
        self.gradients = Gradients(buffer, self.sums, engine)

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

    @property
    def codes_states(self) -> bool:
        """Whether moments that visit the device rest as codes."""
        return self._engine.state_dtype != "fp32"

    @property
    def publishes(self) -> bool:
        """Whether a rank holds more of the weights than it steps, and gets the rest from others: see `publishing`."""
        return self.plan.optimizer.sharded and (not self.plan.parameter.sharded or self.region.parts > 1)

    def cast(self, values: Tensor | None = None) -> None:
        """Bring changed masters into this rank's part of the weights that compute, on the current stream.

        values: all of them, on the device; None where they are there in place.
        """
        if not self.shares_weights:
            kept, event = self.deliver(self.master.tensor if values is None else values, 0)
            self._engine.lanes.compute_waits(event)  # before the memory of `kept` is written again
            del kept

    def deliver(self, values: Tensor, begin: int) -> tuple[Tensor, torch.Event | None]:
        """Write new masters, from element `begin` of this rank's region, into the weights that compute.

        values: on the device; written on the current stream, which must be the lane that made them.
        Gives what must live until the event is done.
        """
        buffer = self.buffer
        if buffer.slab is None or buffer.slab.tier is Tier.GPU:
            sharded = self.plan.parameter.sharded
            target = buffer.shard[self.region.in_shard] if sharded else buffer.whole[self.region.interval]
            target[begin : begin + values.numel()].copy_(values, non_blocking=True)
            return values, None
        if self.publishes:  # all of the shard comes from the masters of its holders, see `publishing`
            return values, None
        values = values.to(buffer.dtype)
        lanes = self._engine.lanes
        lanes.down.wait(lanes.mark_compute())
        return values, buffer.slab.put(values, begin).enqueued()

    @property
    def at_rest(self) -> Iterator[tuple[Role, Tier, int]]:
        """What rests, in bytes; the optimizer's states are its own to count."""
        yield "parameter", self.buffer.tier, self.buffer.bytes_at_rest
        for tier, nbytes in self.sums.nbytes.items():
            yield "gradient", tier, nbytes
        if not self.shares_weights:
            yield "optimizer", self.master.tier, self.master.nbytes

    def rest_on_device(self, master: Slab) -> None:
        """From now on master and gradients stay on the device. Between steps only."""
        self.sums.rest_on_device(master, keep=self.gradients.at_rest is not None)
        self.master = master
