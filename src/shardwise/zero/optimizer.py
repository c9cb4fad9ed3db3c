"""The user's own optimizer, stepping on flat shards.

Nothing is replaced: the object, its class, its hyperparameters and its groups stay. What changes is what its groups hold:
instead of the model's parameters, the pieces of them that lie in this rank's master shards.

    group 0: [q.lora_A (8, 512), q.lora_B (512, 8)]   ->   rank 0: [q.lora_A[0:4096], q.lora_B[0:1024]]
                                                           rank 1: [q.lora_B[1024:4096]]

An elementwise optimizer cannot tell the difference. One that looks at whole rows, matrices or gradients can, and is refused.
`step` and `zero_grad` are set on the instance, as torch's LR schedulers do with `step`, because a step must first clip,
check for overflow and attach the gradients, and afterwards publish the weights.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import OptimizerError, PrepareError
from . import publishing
from .clipping import clip_factor, global_norm, power_sum
from .collectives import Ranks
from .elementwise import check_elementwise, steps_in_parts
from .gradients import Gradients, squared_norm
from .plan import Tier
from .portions import Role
from .precision import LossScaler
from .residency import Residency
from .sharded import ShardedModel
from .shards import Shard, Visits
from .unit import Unit
from .verdicts import Verdicts

log = logging.getLogger("shardwise")

# Those whose fused kernels take a gradient scale, on GPU and CPU.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

# id(optimizer) -> what drives it, which the optimizer's own `step` keeps alive: when the optimizer goes, both go.
_steppers: WeakValueDictionary[int, ShardedOptimizer] = WeakValueDictionary()


def find_sharded_optimizer(optimizer: Optimizer) -> ShardedOptimizer | None:
    """The ShardedOptimizer that drives `optimizer`, or None."""
    found = _steppers.get(id(optimizer))
    return found if found is not None and found.optimizer is optimizer else None


class ShardedOptimizer:
    """Drives one optimizer over the shards of one or more models.

    optimizer:         the user's object; its groups hold the models' parameters. Frozen ones are left out of it.
    models:            where those parameters are.
    scaler:            the loss scale; must be the one that scaled the loss.
    gradient_clipping: the largest global 2-norm of the gradient at a step; None does not clip.
    Collective. Raises, on every rank: OptimizerError for an optimizer that is not elementwise, has taken steps already, or
    holds parameters that are not the models'; PrepareError for one that is prepared already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        models: Sequence[ShardedModel],
        *,
        scaler: LossScaler | None = None,
        gradient_clipping: float | None = None,
    ) -> None:
        if not models:
            raise OptimizerError("an optimizer was prepared, but no model. Prepare the model before it, or with it.")
        self.optimizer = optimizer
        self.models = list(models)
        self.ranks: Ranks = models[0].ranks
        self.scaler = scaler or LossScaler(enabled=False)
        self.gradient_clipping = gradient_clipping
        self.step_was_skipped = False
        self.steps = 0
        self._factor: Tensor | None = None  # by which the coming step multiplies the gradients, besides 1 / loss scale
        self._verdicts = Verdicts(self.ranks, models[0].engine.lanes)
        self.ranks.together(self._refuse_what_cannot_work)
        self._shards: list[Shard] = []
        self._members: dict[int, tuple[Gradients, list[int]]] = {}
        self._take_over()
        driven = {id(g) for g, indices in self._members.values() if len(indices) == len(g.buffer.members)}
        self._residencies = [
            Residency(model, model.gpu_memory_budget, driven) for model in models if model.gpu_memory_budget is not None
        ]
        _steppers[id(optimizer)] = self

    # Taking over.

    def _homes(self) -> dict[int, tuple[Gradients, int]]:
        """id(parameter) -> its gradients and its place among them."""
        return {
            id(member.parameter): (unit.gradients, index)
            for model in self.models
            for unit in model.units
            if unit.gradients is not None
            for index, member in enumerate(unit.gradients.buffer.members)
        }

    def _refuse_what_cannot_work(self) -> None:
        optimizer, name = self.optimizer, type(self.optimizer).__name__
        if find_sharded_optimizer(optimizer) is not None:
            raise PrepareError(f"this {name} has been prepared already. Prepare each optimizer once.")
        check_elementwise(optimizer, visits=any(not g.in_place for g, _ in self._homes().values()))
        if any(float(state.get("step", 1)) > 0 for state in optimizer.state.values()):
            raise OptimizerError(f"this {name} has taken steps already. Prepare it before its first step.")
        homes = self._homes()
        known = {id(p) for model in self.models for p in model.model.parameters()}
        for number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise OptimizerError(
                        f"parameter {place} of group {number} of this {name}, of shape {tuple(parameter.shape)}, belongs to "
                        "no prepared model. Make the optimizer from the parameters of the model that you prepare, after "
                        "adapters have been added to it."
                    )
                if parameter.requires_grad and id(parameter) not in homes and parameter.numel():
                    raise OptimizerError(
                        f"parameter {place} of group {number} of this {name} was frozen when its model was prepared. Set "
                        "requires_grad before prepare."
                    )

    def _take_over(self) -> None:
        homes = self._homes()
        pieces: dict[int, list[Shard]] = {}
        self._visits = Visits(self.optimizer)
        for gradients in {id(g): g for g, _ in homes.values()}.values():
            for piece in gradients.pieces():
                shard = Shard(gradients, piece.slot, piece.in_slot, piece.in_shard, piece.numel)
                pieces.setdefault(id(gradients.buffer.members[piece.slot].parameter), []).append(shard)
        for number, group in enumerate(self.optimizer.param_groups):
            mine = []
            for parameter in group["params"]:
                if id(parameter) in homes:
                    gradients, index = homes[id(parameter)]
                    self._members.setdefault(id(gradients), (gradients, []))[1].append(index)
                    mine += pieces.get(id(parameter), [])
                    self._hand_over_state(parameter, pieces.get(id(parameter), []))
            for shard in mine:
                shard.group = number
            group["params"] = [shard.tensor for shard in mine]
            self._shards += mine
            if isinstance(self.optimizer, _FUSED) and group.get("fused") is None and not group.get("foreach"):
                # One kernel over all shards, which also takes the clip factor; torch's default is a loop on the CPU.
                group["fused"] = not (group.get("capturable") or group.get("differentiable"))
        self._fused = isinstance(self.optimizer, _FUSED) and all(g.get("fused") for g in self.optimizer.param_groups)

        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(closure)

        def zero_grad(_: Optimizer, set_to_none: bool = True) -> None:
            self.zero_grad()

        # LR schedulers mark the step that they wrap, and warn when it was replaced; this one sets _opt_called as theirs does.
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        # Methods, not plain functions: LR schedulers take them apart to count the steps.
        driven: Any = self.optimizer
        driven.step = types.MethodType(step, self.optimizer)
        driven.zero_grad = types.MethodType(zero_grad, self.optimizer)

    def _hand_over_state(self, parameter: Tensor, shards: Sequence[Shard]) -> None:
        """Cut the state that some optimizers (Adagrad) make in their constructor into the pieces of this rank."""
        state = self.optimizer.state.pop(parameter, None)
        for shard in shards if state else ():
            begin, end = shard.in_slot, shard.in_slot + shard.numel
            mine = {
                key: value.reshape(-1)[begin:end].to(shard.gradients.master.dtype, copy=True)
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim
                else copy.copy(value)
                for key, value in state.items()
            }
            if shard.gradients.in_place:
                device = shard.tensor.device
                mine = {key: v.to(device) if isinstance(v, Tensor) and v.ndim else v for key, v in mine.items()}
                self.optimizer.state[shard.tensor] = mine
            else:
                self._visits.remember(shard, mine)

    @property
    def shards(self) -> list[Shard]:
        """What the optimizer holds on this rank."""
        return self._shards

    def resting_state(self, shard: Shard, key: str, dtype: torch.dtype) -> Any:
        """A place for state `key` of a shard that is not in place; gives what the optimizer's dictionary holds for it."""
        model = next(m for m in self.models if any(u.gradients is shard.gradients for u in m.units))
        return self._visits.place(model, shard, key, dtype)

    # The loss.

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether this micro-batch's loss is finite; the step reports it. No synchronisation."""
        if not self.scaler.enabled:  # fp16 overflows by design; the scaler deals with it
            self._verdicts.note_loss(loss)

    # Clipping.

    def clip_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of `parameters` together to `max_norm` and return their true global norm before it.

        The gradients are those of the whole batch, averaged over ranks, loss scale removed. Collective.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self._verdicts.note_clipping(max_norm=float(max_norm), norm_type=float(norm_type))
        shards = self._chosen(parameters)
        sharded = self.models[0].plan.optimizer.sharded
        if norm_type == 2 and self._is_all(parameters):
            total = self._square()
            if sharded:
                self.ranks.all_reduce(total, "sum")
            norm = total.sqrt() / self.scaler.value
        else:
            self._wait_for_host()
            norm = (
                global_norm(self._gradients(shards), float(norm_type), self.ranks, sharded=sharded) / self.scaler.value
            )
        if self._factor is not None:
            norm = norm * self._factor
        factor = clip_factor(norm, float(max_norm))
        if self._is_all(parameters):
            self._factor = factor if self._factor is None else self._factor * factor
        else:
            self._wait_for_host()
            _multiply(self._gradients(shards), factor)
            self._changed(shards)
        return norm

    def _square(self) -> Tensor:
        """The squared 2-norm of this rank's part of the gradients of all parameters, on the device.

        What left for host memory was measured before it went; only sums of several micro-batches are read there. On the device
        nothing is measured before somebody has clipped once.
        """
        whole = [g for g, indices in self._members.values() if len(indices) == len(g.buffer.members)]
        sums = [g for g in whole if g.square is None and g.at_rest is not None]
        if any(g.host is not None for g in sums):
            self._wait_for_host()
        known = {id(g): g.square for g in whole if g.square is not None}
        known |= {id(g): squared_norm(g.at_rest).to(self.ranks.device) for g in sums}
        for gradients in whole:
            gradients.measured = True  # of the next backward, while it goes on
        rest = [shard for shard in self._shards if id(shard.gradients) not in known]
        if any(shard.gradients.host is not None for shard in rest):
            self._wait_for_host()
        total = power_sum(self._gradients(rest), 2.0, self.ranks.device)
        for square in known.values():
            total = total + square
        return total

    @staticmethod
    def _gradients(shards: Iterable[Shard]) -> list[Tensor]:
        return [gradient for shard in shards if (gradient := shard.gradient()) is not None]

    @staticmethod
    def _changed(shards: Iterable[Shard]) -> None:
        for gradients in {id(shard.gradients): shard.gradients for shard in shards}.values():
            gradients.changed()

    def clip_value(self, parameters: Iterable[Tensor], value: float) -> None:
        """Clamp every element of the gradients of `parameters` to [-value, value]."""
        self._verdicts.note_clipping(clip_value=float(value))
        self._wait_for_host()
        if self._factor is not None:
            _multiply(self._gradients(self._shards), self._factor)
            self._factor = None
        self._changed(self._shards)
        grads = self._gradients(self._chosen(parameters))
        limit = float(value) * self.scaler.value
        if grads:
            torch._foreach_clamp_min_(grads, -limit)
            torch._foreach_clamp_max_(grads, limit)

    def ledger(self) -> dict[tuple[Role, Tier], int]:
        """Bytes of the optimizer's states (moments and step counts) on this rank; the masters are in the model's ledger."""
        found: dict[tuple[Role, Tier], int] = {}
        for shard in self._shards:
            tier = shard.gradients.master.tier
            for value in self.optimizer.state.get(shard.tensor, {}).values():
                if isinstance(value, Tensor) and (shard.gradients.in_place or not value.ndim):
                    found["optimizer", tier] = found.get(("optimizer", tier), 0) + value.nbytes
        for gradients, _ in self._members.values():
            for slab in gradients.states.values():
                found["optimizer", slab.tier] = found.get(("optimizer", slab.tier), 0) + slab.nbytes
        return found

    def _is_all(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are all that the optimizer drives: asked of parameters, for this rank's shards may all be theirs."""
        given = {id(p) for p in parameters}
        return self._driven() <= given or {id(shard.tensor) for shard in self._shards} <= given != set()

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any of `parameters` is driven by this optimizer."""
        mine = self._driven()
        return any(id(p) in mine for p in parameters)

    def _driven(self) -> set[int]:
        """The ids of the model's parameters that this optimizer changes, on this rank or another."""
        return {id(g.buffer.members[i].parameter) for g, indices in self._members.values() for i in indices}

    def _chosen(self, parameters: Iterable[Tensor]) -> list[Shard]:
        wanted = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        return [
            shard for shard in self._shards
            if id(shard.gradients.buffer.members[shard.index].parameter) in wanted or id(shard.tensor) in wanted
        ]  # fmt: skip

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, if gradients are complete; nothing while they are only accumulated. Collective."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.raise_if_bad()
        if not any(gradients.at_rest is not None for gradients, _ in self._members.values()):
            return result
        self.steps += 1
        norm = self._agree()
        self.step_was_skipped = False
        if self.scaler.enabled:
            assert norm is not None
            overflowed = not bool(torch.isfinite(norm))
            self.scaler.update(overflowed, step=self.steps, say=self.ranks.rank == 0)
            self.step_was_skipped = overflowed
        if not self.step_was_skipped:
            self._apply(norm)
        self._factor = None
        self._forget()
        if not self.step_was_skipped:
            for residency in self._residencies:
                residency.after_step(self.optimizer, self._shards)
            for model in self.models:
                for call in model.after_step:
                    call()
        return result

    def zero_grad(self) -> None:
        """Forget the gradients; nothing while they are being accumulated, which setting `sync_gradients` ends."""
        if not any(model.accumulating and not model.sync_gradients for model in self.models):
            self._factor = None
            self._verdicts.forget()
            self._forget()

    @torch.no_grad()
    def _apply(self, norm: Tensor | None) -> None:
        factor = self._factor
        if self.scaler.enabled:
            unscale = torch.full((), 1.0 / self.scaler.value, device=self.ranks.device)
            factor = unscale if factor is None else factor * unscale
        if self.gradient_clipping is not None:
            assert norm is not None
            clip = clip_factor(norm, self.gradient_clipping)
            factor = clip if factor is None else factor * clip
        here = [shard for shard in self._shards if shard.gradients.in_place]
        if any(shard.gradients.host is not None for shard in here):
            self._wait_for_host()
        grads = []
        for shard in here:
            gradient = shard.gradient()
            if gradient is not None:
                shard.tensor.grad = gradient.to(shard.tensor.dtype)
                grads.append(shard.tensor.grad)
        driven: Any = self.optimizer
        if factor is not None and grads:
            if self._fused:
                driven.grad_scale = factor.reciprocal().to(grads[0].device, torch.float32)
                driven.found_inf = torch.zeros((), device=grads[0].device)
            else:
                _multiply(grads, factor)
        fences = [model.engine.peers for model in self.models if model.engine.peers is not None]
        for peers in fences:
            peers.before_step()
        units = [unit for model in self.models for unit in self._units(model)]
        resting = [unit for unit in units if unit.gradients.in_place]
        try:
            try:
                self._step_in_place(resting, here)
            finally:
                driven.grad_scale = driven.found_inf = None
                driven._opt_called = True  # LR schedulers check that the step came before theirs
                for shard in here:
                    shard.tensor.grad = None
            for model in self.models:
                visiting = [unit for unit in self._units(model) if not unit.gradients.in_place]
                if visiting:
                    shards = [shard for shard in self._shards if not shard.gradients.in_place]
                    self._visits.step(model, visiting, shards, factor, fused=self._fused)
                if model.engine.stores.uses_disk:
                    model.drain()
        finally:
            publishing.arrive(units)
            for peers in fences:
                peers.after_step()

    def _step_in_place(self, units: Sequence[Unit], shards: Sequence[Shard]) -> None:
        """Step `shards`, which have their gradients, and send the weights of `units` as soon as they are there."""
        groups = publishing.in_groups(units)
        apart = len(groups) > 1 and steps_in_parts(self.optimizer)
        if not apart:
            self._call()
        for group in groups:
            if apart:
                mine = {id(unit.gradients) for unit in group}
                with self._holding({id(shard.tensor) for shard in shards if id(shard.gradients) in mine}):
                    self._call()
            for unit in group:
                unit.cast()
            publishing.send(group)

    def _call(self) -> None:
        """Let the user's optimizer step what it holds and has a gradient."""
        with torch.enable_grad():
            type(self.optimizer).step(self.optimizer)

    @contextmanager
    def _holding(self, tensors: Collection[int]) -> Iterator[None]:
        """Inside, the optimizer's groups hold only these, given by their ids."""
        groups = self.optimizer.param_groups
        everything = [group["params"] for group in groups]
        for group in groups:
            group["params"] = [tensor for tensor in group["params"] if id(tensor) in tensors]
        try:
            yield
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params

    def _units(self, model: ShardedModel) -> list[Any]:
        return [u for u in model.units if u.gradients is not None and id(u.gradients) in self._members]

    def _forget(self) -> None:
        for gradients, indices in self._members.values():
            gradients.forget(indices)

    def _wait_for_host(self) -> None:
        """Gradients that rest in host memory are there only when the copies are done."""
        for model in self.models:
            if model.plan.optimizer.tier is not Tier.GPU:
                model.synchronize()

    def _agree(self) -> Tensor | None:
        """The gradients' global 2-norm as the step will see it before clipping, if anything needs it. One all_reduce.

        It carries each rank's verdict on its loss, and its rate and clipping: a NaN on one rank is an error on all.
        """
        ranks = self.ranks
        wants_norm = self.scaler.enabled or self.gradient_clipping is not None
        facts = torch.zeros(1 + self._verdicts.numel, device=ranks.device)
        if wants_norm:
            total = self._square()
            facts[0] = total if self.models[0].plan.optimizer.sharded else total / ranks.world_size
        self._verdicts.write(facts[1:], self.optimizer.param_groups)
        if ranks.world_size > 1:
            ranks.all_reduce(facts)
        self._verdicts.read(self.steps, facts[1:])
        if not wants_norm:
            return None
        norm = facts[0].sqrt() / self.scaler.value
        return norm if self._factor is None else norm * self._factor

    def raise_if_bad(self) -> None:
        """Raise what an earlier step's message said: NonFiniteError, or ConfigError if ranks differ; every rank does."""
        self._verdicts.raise_if_bad()


def _multiply(grads: Sequence[Tensor], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))
