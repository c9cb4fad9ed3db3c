"""A learning-rate scheduler that steps when the optimizer does.

`prepare` leaves the scheduler the user's own object: its class is exchanged for a subclass whose `step` knows about
accumulation, skipped steps and the number of ranks, and what that needs is kept in a side table, so that `state_dict()`
holds nothing new. Methods of the class, properties and `isinstance` go on as before.

    step() while gradients are only accumulated      counts a call, if `adjust_scheduler`; no change of the rate
    step() after an optimizer step that was skipped  nothing
    step() otherwise                                 `times` steps: once per rank unless the loader's batches are split
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from .accumulation import GradientState
from .deepspeed_schedules import Schedule

# What `prepare` takes as a scheduler.
Scheduler = LRScheduler | Schedule
SCHEDULERS = (LRScheduler, Schedule)


@dataclass(frozen=True)
class Rhythm:
    """times: steps of the schedule per optimizer step. with_optimizer: False lets every call step, once.
    skipped: whether the last optimizer step was skipped."""

    times: int
    with_optimizer: bool
    skipped: Callable[[], bool]


_rhythms: weakref.WeakKeyDictionary[Scheduler, Rhythm] = weakref.WeakKeyDictionary()
_classes: dict[type[Scheduler], type[Scheduler]] = {}


def prepare_scheduler(scheduler: Scheduler, rhythm: Rhythm) -> None:
    """Give `scheduler` a rhythm; a second call replaces it."""
    if not is_prepared(scheduler):
        scheduler.__class__ = _stepping_class(type(scheduler))
    _rhythms[scheduler] = rhythm


def release_scheduler(scheduler: Scheduler) -> None:
    """Make it a schedule of the script's own again, which each call of `step` steps once."""
    if _rhythms.pop(scheduler, None) is not None:
        scheduler.__class__ = type(scheduler).__mro__[1]


def is_prepared(scheduler: Scheduler) -> bool:
    return scheduler in _rhythms


class _Itself:
    """`scheduler.scheduler`, as accelerate's wrapper has it. What an instance has under that name is seen first."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else instance


def _stepping_class(plain: type[Scheduler]) -> type[Scheduler]:
    if plain not in _classes:

        def step(self: Any, *args: Any, **kwargs: Any) -> None:
            rhythm = _rhythms.get(self)
            if rhythm is None or not rhythm.with_optimizer:
                plain.step(self, *args, **kwargs)
                return
            state = GradientState()
            if not state.sync_gradients:
                if state.adjust_scheduler and hasattr(self, "_step_count"):
                    self._step_count += 1
                return
            if rhythm.skipped():
                return
            for _ in range(rhythm.times):
                # A schedule of fixed length raises past its end, which the last of several steps may reach.
                if hasattr(self, "total_steps") and self._step_count > self.total_steps:
                    return
                plain.step(self, *args, **kwargs)

        body: dict[str, Any] = {
            "step": step,
            "_is_accelerate_prepared": property(is_prepared),
            "__doc__": plain.__doc__,
            "__module__": plain.__module__,
            "__reduce_ex__": _reduce,
        }
        if not hasattr(plain, "scheduler"):
            body["scheduler"] = _Itself()
        _classes[plain] = type(plain.__name__, (plain,), body)
        _classes[plain].__qualname__ = plain.__qualname__
    return _classes[plain]


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class: a copy has no rhythm."""
    plain = type(self).__mro__[1]
    return _rebuild, (plain,), self.__dict__


def _rebuild(plain: type[Scheduler]) -> Scheduler:
    return plain.__new__(plain)
