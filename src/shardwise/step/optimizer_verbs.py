"""Methods of an optimizer's class that torch's optimizers do not have, and that work on its parameters as `step` does.

    optimizer.eval(), .train()       of schedule-free optimizers: swap the weights for averages, and back
    optimizer.update_hessian()       of Sophia: a look at the gradients between two steps

They are driven as a step is: with gradients in place, on this rank's shards, and new weights go to every rank afterwards. A
method is such a one if its code, or that of methods that it calls, speaks of `params`; all others are left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import OptimizerError
from . import publishing
from .held import HeldGradients
from .optimizer_state import OptimizerState
from .trial import Trial


class OwnVerbs:
    """Such methods of one optimizer.

    states, held: the optimizer's. trial: tries each at its first call.
    """

    def __init__(self, states: OptimizerState, held: HeldGradients, trial: Trial) -> None:
        self.optimizer = states.optimizer
        self._states = states
        self._held = held
        self._trial = trial
        self._inside = False

    @property
    def counts(self) -> bool:
        """Whether steps change something of a parameter group."""
        return self._trial.counts

    def install(self) -> None:
        """Set them on the optimizer, as methods of this one object."""
        for name in own_verbs(type(self.optimizer)):

            def verb(_: Optimizer, *args: Any, _name: str = name, **kwargs: Any) -> Any:
                return self._call(_name, args, kwargs)

            verb.__name__ = name
            setattr(self.optimizer, name, MethodType(verb, self.optimizer))

    @contextmanager
    def as_in_the_class(self) -> Iterator[None]:
        """Inside, they are the class's own: a step calls them."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def _call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        method = getattr(type(self.optimizer), name)
        if self._inside:
            return method(self.optimizer, *args, **kwargs)
        ranks, models = self._held.ranks, self._held.models
        self._states.refuse_released()
        ranks.assemble(f"optimizer.{name}()")
        ranks.together(lambda: self._check(name, args, kwargs))
        for model in models:
            model.schedule.stop_lingering()
            model.follow_weights()
            model.engine.lanes.states_change()
        units = [unit for model in models for unit in self._held.groups.units(model)]
        with publishing.fenced([model.engine for model in models]), self.as_in_the_class():
            with self._held.attached():
                result = method(self.optimizer, *args, **kwargs)
            with torch.no_grad():
                for group in publishing.in_groups(units):
                    for unit in group:
                        unit.cast()
                    publishing.send(group)
            publishing.arrive(units)
        return result

    def _check(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self._held.groups.wholes:
            raise OptimizerError(
                f"{type(self.optimizer).__name__}.{name}() works on the parameters of its groups, and some of them are stepped "
                "whole, each on one rank: they are there in step() only. Take zero_stage 0 without it, or do without it."
            )
        if any(not shard.trained.in_place for shard in self._held.groups.shards):
            raise OptimizerError(
                f"{type(self.optimizer).__name__}.{name}() works on the parameters of its groups. Some of their masters "
                "and states rest off the device, from where only step() fetches them: set offload_optimizer_device: none."
            )
        self._trial.try_verb(name, args, kwargs)


def own_verbs(kind: type[Optimizer]) -> list[str]:
    """The names of such methods of a class."""
    own = [name for name in dir(kind) if not hasattr(Optimizer, name)]
    codes = {name: code for name in own if (code := _code_of(inspect.getattr_static(kind, name))) is not None}
    found = {name for name, code in codes.items() if "params" in _constants(code)}
    more = found
    while more:
        more = {name for name, code in codes.items() if name not in found and _names(code) & found}
        found |= more
    return sorted(name for name in found if not name.startswith("_"))


def _code_of(method: Any) -> CodeType | None:
    if isinstance(method, (staticmethod, classmethod, property)):
        return None
    return getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None


def _inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inner(constant)


def _constants(code: CodeType) -> set[Any]:
    return {item for part in _inner(code) for item in part.co_consts if isinstance(item, str)}


def _names(code: CodeType) -> set[str]:
    return {name for part in _inner(code) for name in part.co_names}
