"""The gradients that an optimizer's next step will see: what they wait to be multiplied by, their norm, and clipping them.

Where an optimizer drives all of a buffer, clipping only leaves a factor with its gradients, and the step multiplies by it in
the pass that it makes anyway. Where buffers are shared, the parts that are clipped are multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..plan.plan import Tier
from ..plan.precision import LossScaler
from ..ranks.ranks import Ranks
from ..zero.norms import over_owners
from ..zero.sharded import ShardedModel
from ..zero.sums import squared_norm
from ..zero.trained import Trained
from .clipping import clip_factor, global_norm, power_sum
from .groups import Groups
from .visits import Shard


class HeldGradients:
    """The gradients of what one optimizer drives.

    groups: what it drives. models: where that is. scaler: the loss scale that gradients carry.
    """

    def __init__(self, groups: Groups, models: Sequence[ShardedModel], scaler: LossScaler) -> None:
        self.groups = groups
        self.models = models
        self.scaler = scaler
        self.ranks: Ranks = models[0].ranks

    def present(self) -> list[Trained]:
        """Those that hold a gradient at this moment."""
        return [trained for trained, _ in self.groups.members.values() if trained.gradients.at_rest is not None]

    def carry_scale(self) -> None:
        """A backward is about to add to what is there: let that carry its loss scale too."""
        scale = self.scaler.value
        for trained, _ in self.groups.members.values():
            if trained.gradients.at_rest is not None:
                carried = trained.sums.loss_scale if trained.sums.scaled else 1.0
                if carried != scale:  # the step of another optimizer may have moved the scale
                    trained.sums.multiply(torch.tensor(scale / carried))
                trained.sums.scaled = True
            trained.sums.loss_scale = scale

    def outstanding(self) -> tuple[Tensor | None, float]:
        """(the factor, the loss scale) that all gradients alike still wait for. Where they differ, they are multiplied now."""
        held = self.present()
        scale = self.scaler.value
        if len({trained.sums.scaled for trained in held}) > 1:
            for trained in held:
                if trained.sums.scaled:
                    trained.sums.multiply(torch.tensor(1.0 / scale))
                    trained.sums.scaled = False
        if len({id(trained.sums.factor) for trained in held}) > 1:
            for trained in held:
                trained.sums.apply_factor()
        return (held[0].sums.factor, scale if held[0].sums.scaled else 1.0) if held else (None, scale)

    def look(self) -> None:
        """Take over what the script has done to gradients."""
        for model in self.models:
            model.finish_interrupted()
            model.end_accumulation()
            model.thawing.catch_up(complete=not model.accumulating)
            model.look_at_gradients()

    def unscale(self) -> None:
        """Take the loss scale off the gradients, for scripts that look at them before the step."""
        self.look()
        for trained in self.present():
            if trained.sums.scaled and self.scaler.enabled:
                trained.sums.scaled = False
                trained.sums.multiply(torch.tensor(1.0 / self.scaler.value))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the optimizer's tensors have their gradients, unscaled and clipped; what is written there counts."""
        self.unscale()
        for trained in self.present():
            trained.sums.apply_factor()
        self.wait_for_host()
        lent = [
            (s, g, g.to(s.tensor.dtype).view(s.shape)) for s in self.groups.shards if (g := s.gradient()) is not None
        ]
        for shard, _, given in lent:
            shard.tensor.grad = given
        try:
            yield
        finally:
            with torch.no_grad():
                for shard, gradient, _ in lent:
                    now, shard.tensor.grad = shard.tensor.grad, None
                    if now is None:
                        gradient.zero_()
                    elif now.data_ptr() != gradient.data_ptr():
                        gradient.copy_(now.reshape(-1))
            self._changed([shard for shard, _, _ in lent])

    def clip_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of `parameters` together to `max_norm` and return their true global norm before it.

        The gradients are those of the whole batch, averaged over ranks, loss scale removed. Collective.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = self.norm(parameters, norm_type)
        self.multiply(parameters, clip_factor(norm, float(max_norm)))
        return norm

    def norm(self, parameters: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
        """The true global norm of the gradients of `parameters`, on the device. Collective."""
        self.look()
        sharded = self.models[0].plan.optimizer.sharded
        earlier, scale = self.outstanding()
        if norm_type == 2 and self.groups.is_all(parameters):
            norm = over_owners(self.square(), 2.0, self.ranks, sharded=sharded).sqrt() / scale
        else:
            self.wait_for_host()
            held, dtype = self._gradients(self.groups.chosen(parameters)), self.groups.norm_dtype
            norm = global_norm(held, float(norm_type), self.ranks, dtype, sharded=sharded) / scale
        return norm if earlier is None else norm * earlier

    def multiply(self, parameters: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply the gradients of `parameters` by a scalar, whose `norm` was just asked for."""
        self.scale(self.groups.chosen(parameters), factor, everything=self.groups.is_all(parameters))

    def scale(self, shards: Sequence[Shard], factor: Tensor, *, everything: bool) -> None:
        """Multiply the gradients of `shards`. everything: these are all, and the step does it in its own pass."""
        earlier, _ = self.outstanding()
        apart = [s for s in shards if not everything or id(s.trained) not in self.groups.sole]
        if everything:
            for trained in self.present():
                if id(trained) in self.groups.sole:
                    trained.sums.factor = factor if earlier is None else earlier * factor
        if apart:
            self.wait_for_host()
            multiply(self._gradients(apart), factor)
        self._changed(apart)

    def square(self) -> Tensor:
        """The squared 2-norm of this rank's part of the gradients of all parameters, on the device.

        What left for host memory was measured before it went; only sums of several micro-batches come up for it. On the device
        nothing is measured before somebody has clipped once.
        """
        whole = [g for g, indices in self.groups.members.values() if len(indices) == len(g.buffer.members)]
        if any(g.gradients.square is None and g.gradients.host is not None for g in whole):
            self.wait_for_host()
        known: dict[int, Tensor] = {}
        # In one order, whichever were measured: that depends on where gradients rest, and the sum's bits must not.
        for trained in whole:
            square, at_rest = trained.gradients.square, trained.gradients.at_rest
            if square is None and at_rest is not None:
                square = squared_norm(at_rest, self.ranks.device)
            if square is not None:
                known[id(trained)] = square
            trained.gradients.measured = True  # of the next backward, while it goes on
        rest = [shard for shard in self.groups.shards if id(shard.trained) not in known]
        if any(shard.trained.gradients.host is not None for shard in rest):
            self.wait_for_host()
        total = power_sum(self._gradients(rest), 2.0, self.ranks.device, self.groups.norm_dtype)
        for square in known.values():
            total = total + square
        return total

    @staticmethod
    def _gradients(shards: Iterable[Shard]) -> list[Tensor]:
        return [gradient for shard in shards if (gradient := shard.gradient()) is not None]

    def _changed(self, shards: Iterable[Shard]) -> None:
        """A verb has changed the gradients of `shards`, or left them a factor; on every rank, which may have none of them."""
        for trained in {id(shard.trained): shard.trained for shard in shards}.values():
            trained.sums.changed()
        for model in self.models:
            model.engine.norms.forget()

    def clip_value(self, parameters: Iterable[Tensor], value: float) -> None:
        """Clamp every element of the gradients of `parameters` to [-value, value]."""
        self.look()
        self.wait_for_host()
        for trained in self.present():
            trained.sums.apply_factor()
        _, scale = self.outstanding()
        shards = self.groups.chosen([parameters] if isinstance(parameters, Tensor) else list(parameters))
        self._changed(shards)
        grads = self._gradients(shards)
        limit = float(value) * scale
        if grads:
            torch._foreach_clamp_min_(grads, -limit)
            torch._foreach_clamp_max_(grads, limit)

    def wait_for_host(self) -> None:
        """Gradients that rest in host memory are there only when the copies are done."""
        for model in self.models:
            if model.plan.optimizer.tier is not Tier.GPU:
                model.engine.synchronize()


def multiply(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all of these in place. factor: a scalar on any device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))
