"""One step of the optimizer's class on all shards: those whose masters rest where they are stepped, and those that visit.

What multiplies the gradients is left to the optimizer's own kernel where that takes a scale. New weights go to every rank group
by group, as soon as they are there: see `publishing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..zero.sharded import ShardedModel
from ..zero.unit import Unit
from . import publishing
from .doubles import double
from .elementwise import steps_in_parts
from .groups import Groups
from .held import HeldGradients, multiply
from .optimizer_verbs import OwnVerbs
from .overrides import standing_in
from .running import counting, holding, run_step
from .visits import Shard, Visits
from .wholes import Whole, WholeSteps


class Applying:
    """Of one optimizer over the shards of `models`. verbs: the optimizer's own methods, where they need care in a step."""

    def __init__(
        self, optimizer: Optimizer, models: Sequence[ShardedModel], groups: Groups, held: HeldGradients
    ) -> None:
        self.optimizer = optimizer
        self.models = models
        self.groups = groups
        self.held = held
        self.verbs: OwnVerbs | None = None
        self._visits = Visits(optimizer)
        self._wholes = WholeSteps(optimizer)

    def apply(self, factor: Tensor | None) -> None:
        """Step everything that has a gradient. factor: a scalar by which gradients are multiplied first. Collective."""
        self._states_change()
        here = [shard for shard in self.groups.stepped if shard.trained.in_place]
        wholes = self.groups.wholes
        every = [trained for trained, _ in self.groups.members.values()]
        if any(trained.gradients.host is not None for trained in every if wholes or trained.in_place):
            self.held.wait_for_host()
        grads = []
        for shard in here:
            gradient = shard.gradient()
            if gradient is not None:
                # In place, unless another optimizer reads the same buffer, and counts on its own factor and scale.
                shared = id(shard.trained) not in self.groups.sole
                shard.tensor.grad = gradient.to(shard.tensor.dtype, copy=shared).view(shard.shape)
                grads.append(shard.tensor.grad)
        driven: Any = self.optimizer
        # Every call of this step begins with these settings and numbers; where there is one call, it has them itself.
        before = double(driven) if wholes or any(not trained.in_place for trained in every) else None
        # Also where nothing of them is here: of what waits for gradients every rank knows the same.
        alone = [trained for trained in every if trained.in_place and id(trained) in self.groups.sole]
        multiplied = [t for t in alone if t.sums.rest is not None and t.sums.rest.dtype == t.master.dtype]
        if factor is not None and grads and self.groups.fused:  # it multiplies in its own pass
            driven.grad_scale = factor.reciprocal().to(grads[0].device, torch.float32)
            driven.found_inf = torch.zeros((), device=grads[0].device)
        else:
            if factor is not None:
                multiply(grads, factor)
            for trained in multiplied:
                trained.sums.stepped()
        units = [unit for model in self.models for unit in self.groups.units(model)]
        with publishing.fenced([model.engine for model in self.models]):
            try:
                self._step_wholes([unit for unit in units if _in_place(unit)], factor, before)
                try:
                    self._step_in_place([unit for unit in units if _in_place(unit)], here)
                finally:
                    driven.grad_scale = driven.found_inf = None
                    driven._opt_called = True  # LR schedulers check that the step came before theirs
                    for shard in here:
                        shard.tensor.grad = None
                for trained in multiplied:
                    trained.sums.stepped()
                shards = [shard for shard in self.groups.stepped if not shard.trained.in_place]
                partly = self.groups.partly
                for model in self.models:
                    away = [unit for unit in self.groups.units(model) if not _in_place(unit)]
                    visiting = [unit for unit in away if id(unit.trained) in partly]
                    if visiting:
                        self._visits.step(model, visiting, shards, factor, before, fused=self.groups.fused)
                    self._step_wholes(away, factor, before)
                    if model.engine.stores.uses_disk:
                        model.engine.drain()
            finally:
                publishing.arrive(units)

    def run(self, absent: Mapping[int, Tensor] | None = None) -> None:
        """The class's step, on what is in place and stepped in shards. absent: see `counting`."""
        self._states_change()  # also where nothing has a gradient: an optimizer may move its states all the same
        mine = {id(shard.tensor) for shard in self.groups.stepped} if self.groups.wholes else None
        verbs = self.verbs.as_in_the_class() if self.verbs is not None else nullcontext()
        device = self.models[0].ranks.device
        with (
            verbs,
            holding(self.optimizer, mine) if mine is not None else nullcontext(),
            counting(self.optimizer, absent or {}, device),
            standing_in(self.optimizer, self.groups.pairs),
        ):
            run_step(self.optimizer)

    def _states_change(self) -> None:
        for model in self.models:
            model.engine.lanes.states_change()

    def _step_wholes(self, units: Sequence[Unit], factor: Tensor | None, before: Any) -> None:
        """Step the parameters of `units` that are stepped whole; new weights of units that are not in place leave at once."""
        of: dict[int, list[Whole]] = {}
        for whole in self.groups.wholes:
            of.setdefault(id(whole.trained), []).append(whole)
        if not of:
            return
        by_trained = {id(unit.trained): unit for unit in units}
        for wholes, master in self._wholes.step((of.get(key, []) for key in by_trained), factor, before):
            trained = wholes[0].trained
            if not trained.in_place:
                unit = by_trained[id(trained)]
                unit.engine.put_to_rest(master, trained.master)
                trained.cast(master)
                publishing.send([unit])

    def _step_in_place(self, units: Sequence[Unit], shards: Sequence[Shard]) -> None:
        """Step `shards`, which have their gradients, and send the weights of `units` as soon as they are there."""
        groups = publishing.in_groups(units)
        apart = len(groups) > 1 and steps_in_parts(self.optimizer)
        if not apart:
            self.run(self.groups.elsewhere(shards) if self.verbs is not None and self.verbs.counts else None)
        for group in groups:
            if apart:
                mine = {id(unit.trained) for unit in group}
                with holding(self.optimizer, {id(shard.tensor) for shard in shards if id(shard.trained) in mine}):
                    # Of torch's own, which have no settings of single parameters.
                    run_step(self.optimizer)
            for unit in group:
                unit.cast()
            publishing.send(group)


def _in_place(unit: Unit) -> bool:
    return unit.trained is not None and unit.trained.in_place
