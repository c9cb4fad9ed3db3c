"""The user's own optimizer, stepping on flat shards.

Nothing is replaced: the object, its class, its hyperparameters and its groups stay. What changes is what its groups hold:
instead of the model's parameters, the pieces of them that lie in this rank's master shards.

    group 0: [q.lora_A (8, 512), q.lora_B (512, 8)]   ->   rank 0: [q.lora_A[0:4096], q.lora_B[0:1024]]
                                                           rank 1: [q.lora_B[1024:4096]]

An elementwise optimizer cannot tell the difference. One that looks at whole rows, matrices or gradients can: see trial.py.
`step` and `zero_grad` are set on the instance, as torch's LR schedulers do with `step`, because a step must first clip,
check for overflow and attach the gradients, and afterwards publish the weights. `state_dict` and `load_state_dict` are too, see
optimizer_dict.py.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakMethod, WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import OptimizerError, PrepareError
from ..plan.blueprint import Role
from ..plan.plan import Tier
from ..plan.precision import LossScaler
from ..ranks.activity import Doing, activity
from ..ranks.ranks import Ranks
from ..zero.norms import addend, own_power
from ..zero.sharded import ShardedModel
from .applying import Applying
from .averaging import refuse_swapped
from .clipping import clip_factor
from .elementwise import Judgement, judged
from .groups import Groups
from .held import HeldGradients
from .optimizer_dict import OptimizerDict
from .optimizer_state import OptimizerState
from .optimizer_verbs import OwnVerbs
from .residency import Residency
from .state_kinds import has_stepped
from .telling import FlagOnOptimizer
from .verdicts import Verdicts
from .visits import Shard
from .ways import Handling

log = logging.getLogger("shardwise")

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
    measures_norm:     `norm` is found in every step, also where nothing clips.
    norm:              the gradients' global 2-norm at the last step before it clipped them, a scalar on the device; None
                       where it was not needed.
    Collective. Raises, on every rank: OptimizerError for an optimizer that is not elementwise, or holds parameters
    that are not the models'; PrepareError for one that is prepared already.
    """

    step_was_skipped = FlagOnOptimizer()

    def __init__(
        self,
        optimizer: Optimizer,
        models: Sequence[ShardedModel],
        *,
        scaler: LossScaler | None = None,
        gradient_clipping: float | None = None,
        measures_norm: bool = False,
    ) -> None:
        if not models:
            raise OptimizerError("an optimizer was prepared, but no model. Prepare the model before it, or with it.")
        self.optimizer = optimizer
        self.models = list(models)
        self.ranks: Ranks = models[0].ranks
        self.scaler = scaler or LossScaler(enabled=False)
        self.gradient_clipping = gradient_clipping
        self.measures_norm = measures_norm
        self.norm: Tensor | None = None
        self.step_was_skipped = False
        self.steps = 0
        self.verdicts = Verdicts(self.ranks, models[0].engine.lanes)
        judgement = self.ranks.together(self._tried)
        self._trial = judgement.trial
        self.groups = Groups(optimizer, self.models, judgement.is_whole, together=judgement.handling.together)
        self.held = HeldGradients(self.groups, self.models, self.scaler)
        self._applying = Applying(optimizer, self.models, self.groups, self.held)
        thawed = self.ranks.together(self._to_thaw)
        for model in self.models:
            model.thawing.thaw(p for p in thawed if model.thawing.holds(p))
        self.groups.take_over()
        self.states = OptimizerState(optimizer, self.models, self.groups)
        self.states.adopt()
        self._residencies: list[Residency] = []
        self._fill_budgets()
        self._install()
        _steppers[id(optimizer)] = self

    # Taking over.

    def _tried(self) -> Judgement:
        optimizer, models = self.optimizer, self.models
        if find_sharded_optimizer(optimizer) is not None:
            raise PrepareError(
                f"this {type(optimizer).__name__} has been prepared already. Prepare each optimizer once."
            )
        _check_groups(optimizer, models)
        out_of_place = any(not model.plan.optimizer.tier.in_place for model in models)
        handling = Handling(
            parted=self.ranks.owners.size > 1 and any(model.plan.optimizer.sharded for model in models),
            visits=out_of_place or any(not g.in_place for model in models for g in model.trained()),
            ranks=self.ranks.world_size,
        )
        return judged(optimizer, [g["params"] for g in optimizer.param_groups], handling, self.ranks.device)

    def _to_thaw(self) -> list[Parameter]:
        """What the optimizer shall train, or has states for, and was frozen when its model was prepared."""
        self.groups.check(self.optimizer.param_groups)
        return [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad or has_stepped(self.optimizer.state.get(parameter, {}))
        ]

    def _install(self) -> None:
        """Set this one's verbs on the optimizer, as methods: LR schedulers take them apart to count the steps."""

        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(closure)

        def zero_grad(_: Optimizer, set_to_none: bool = True) -> None:
            self.zero_grad(set_to_none)

        def add_param_group(_: Optimizer, param_group: dict[str, Any]) -> None:
            self.add_group(param_group)

        # LR schedulers mark the step that they wrap, and warn when it was replaced; this one sets _opt_called as theirs does.
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        for verb in (step, zero_grad, add_param_group):
            setattr(self.optimizer, verb.__name__, types.MethodType(verb, self.optimizer))
        self.dictionary = OptimizerDict(self.states, self.groups).install()
        if self._trial is not None:
            self._applying.verbs = OwnVerbs(self.states, self.held, self._trial)
            self._applying.verbs.install()
        for model in self.models:
            model.thawing.then.append(WeakMethod(self._take_thawed))

    def _fill_budgets(self) -> None:
        """Measure a step, and fill what a budget leaves free."""
        self._residencies = [
            Residency(model, model.options.gpu_memory_budget, self.groups.sole, self.groups.unit_states)
            for model in self.models
            if model.options.gpu_memory_budget is not None
        ]

    def _take_thawed(self, thawed: set[int]) -> None:
        """A model has thawed weights: those that are in the groups are stepped from now on. Collective."""
        self.groups.take_thawed(thawed)
        self.states.adopt_thawed(thawed)
        self._fill_budgets()

    def add_group(self, group: dict[str, Any]) -> None:
        """torch's `add_param_group` for the user's parameters. Collective.

        Weights that were frozen when their model was prepared are trained from now on if they require gradients.
        Raises, on every rank, OptimizerError for what belongs to no prepared model, and what torch raises for a group.
        """
        self.states.refuse_released()
        self.ranks.assemble("optimizer.add_param_group()")
        groups = self.optimizer.param_groups

        def made() -> dict[str, Any]:
            with self.groups.as_given():
                type(self.optimizer).add_param_group(self.optimizer, dict(group))
                try:
                    self.groups.check(groups[-1:], len(groups) - 1)
                    if self._trial is not None:
                        self._trial.judge([*self.groups.parameters, groups[-1]["params"]], len(groups) - 1)
                finally:
                    found = groups.pop()
            return found

        new = self.ranks.together(made)
        wanted = [parameter for parameter in new["params"] if parameter.requires_grad]
        for model in self.models:
            model.thawing.thaw((p for p in wanted if model.thawing.holds(p)), boundary=not model.accumulating)
        groups.append(new)
        self.groups.take_over()
        self._take_thawed({id(parameter) for parameter in new["params"]})

    @staticmethod
    def all() -> list[ShardedOptimizer]:
        """Every sharded optimizer of this process."""
        return list(_steppers.values())

    @property
    def shards(self) -> list[Shard]:
        """What the optimizer holds on this rank."""
        return self.groups.shards

    def resume(self, steps: int, step_was_skipped: bool) -> None:
        """Another run's states have been loaded: forget what was under way for a step, and count from there."""
        self.steps = steps
        self.step_was_skipped = step_was_skipped
        self.verdicts.begin_anew()

    # The loss.

    def raise_if_bad(self) -> None:
        """Raise what an earlier step's message said: NonFiniteError, or ConfigError if ranks differ; every rank does."""
        self.verdicts.raise_if_bad()

    def note_loss(self, loss: Tensor) -> None:
        """A micro-batch's backward begins: remember, without a synchronisation, if its loss is finite; the step reports it."""
        if self.scaler.enabled:
            self.held.carry_scale()  # fp16 overflows by design; the scaler deals with it
        else:
            self.verdicts.note_loss(loss)

    # Clipping.

    def unscale(self) -> None:
        """Take the loss scale off the gradients, for scripts that look at them before the step."""
        self.held.unscale()

    def clip_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """See `HeldGradients.clip_norm`. Collective."""
        self.verdicts.note_clipping(max_norm=float(max_norm), norm_type=float(norm_type))
        return self.held.clip_norm(parameters, max_norm, norm_type)

    def clip_value(self, parameters: Iterable[Tensor], value: float) -> None:
        """See `HeldGradients.clip_value`."""
        self.verdicts.note_clipping(clip_value=float(value))
        self.held.clip_value(parameters, value)

    def ledger(self) -> dict[tuple[Role, Tier], int]:
        """Bytes of the optimizer's states (moments and step counts) on this rank; the masters are in the model's ledger."""
        return self.groups.ledger()

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any of `parameters` is in the optimizer's groups, frozen or not."""
        return self.groups.holds(parameters)

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all of `parameters` are its models'."""
        return self.groups.knows(parameters)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, if gradients are complete; nothing while they are only accumulated. Collective."""
        self.states.refuse_released()
        refuse_swapped(self.models, "optimizer.step()")
        result = None
        if closure is not None:
            if self._trial is not None:
                self._trial.try_closure()
            with torch.enable_grad():
                result = closure()
        self.verdicts.raise_if_bad()
        if any(model.at_boundary is False for model in self.models):
            return result
        self.held.look()
        accumulating = any(model.accumulating for model in self.models)
        if self._trial is not None and not accumulating:
            self._trial.look()
        if not self.held.present():
            if self._trial is not None and not accumulating:
                self._applying.run()  # it may count its steps, as in plain torch
            return result
        self.steps += 1
        activity.begins(Doing.STEP)
        for model in self.models:
            model.schedule.stop_lingering()
            model.follow_weights()
        norm = self.norm = self._agree()
        self.step_was_skipped = False
        if self.scaler.enabled:
            assert norm is not None
            overflowed = not bool(torch.isfinite(norm))
            self.scaler.update(overflowed, step=self.steps, say=self.ranks.rank == 0)
            self.step_was_skipped = overflowed
        if not self.step_was_skipped:
            self._apply(norm)
        if not self.step_was_skipped:
            for residency in self._residencies:
                residency.after_step(self.optimizer, self.groups.stepped)
            for model in self.models:
                for call in model.after_step:
                    call()
        activity.stepped(self.steps)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; nothing while they are being accumulated, which setting `sync_gradients` ends.

        set_to_none: False keeps gradients of zero, with which a step still decays weights and moves by its momentum.
        """
        for model in self.models:
            model.finish_interrupted()
        if any(model.accumulating and not model.sync_gradients for model in self.models):
            return
        self.verdicts.forget()
        if not set_to_none:
            self.held.look()
        for trained, indices in self.groups.members.values():
            if set_to_none:
                trained.gradients.forget(indices)
            else:
                trained.sums.zero(indices)
        self.groups.zero_frozen(set_to_none)

    @torch.no_grad()
    def _apply(self, norm: Tensor | None) -> None:
        if self.gradient_clipping is not None:  # for good, as by torch's function: the next step may see them again
            assert norm is not None
            self.held.scale(self.groups.shards, clip_factor(norm, self.gradient_clipping), everything=True)
        factor, scale = self.held.outstanding()
        if scale != 1.0:
            unscale = torch.full((), 1.0 / scale, dtype=self.groups.norm_dtype, device=self.ranks.device)
            factor = unscale if factor is None else factor * unscale
        self._applying.apply(factor)

    def _agree(self) -> Tensor | None:
        """The gradients' global 2-norm as the step will see it before clipping, if anything needs it. One all_reduce.

        It carries the power sum, then each rank's verdict on its loss, rate and clipping: a NaN on one is an error on all.
        """
        ranks = self.ranks
        wants_norm = self.measures_norm or self.scaler.enabled or self.gradient_clipping is not None
        facts = torch.zeros(1 + self.verdicts.numel, dtype=self.groups.norm_dtype, device=ranks.device)
        if wants_norm:
            self.held.outstanding()
            own = self.held.square()
            facts[0] = addend(own, ranks, sharded=self.models[0].plan.optimizer.sharded)
        self.verdicts.write(facts[1:], self.optimizer.param_groups)
        if ranks.world_size > 1:
            ranks.all_reduce(facts)
        self.verdicts.read(self.steps, facts[1:])
        if not wants_norm:
            return None
        factor, scale = self.held.outstanding()
        norm = (own_power(own, facts[0]) if self.models[0].engine.share.alone else facts[0]).sqrt() / scale
        return norm if factor is None else norm * factor


def _check_groups(optimizer: Optimizer, models: Sequence[ShardedModel]) -> None:
    """Raise OptimizerError for models whose norms are not sums over the same ranks."""
    if len({(model.ranks.shards.members, model.ranks.owners.size) for model in models}) > 1:
        raise OptimizerError(
            f"the models of this {type(optimizer).__name__} are sharded over different groups of ranks. Prepare them with one "
            "shard_group and optimizer_shard_group, all at zero_stage 1 or above or all at 0; or give each its own optimizer."
        )
