"""accelerate's classes for what `prepare` gives, over the objects themselves, which stay the user's own here.

They are for `isinstance`, which is true of a prepared object, and for the call with which accelerate wraps one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ConfigError
from ..front.run import is_prepared_optimizer
from ..ranks.batches import send_to_device
from ..run.process import PartialState
from ..run.scheduler import Rhythm, is_prepared, prepare_scheduler


class _OfPrepared(type):
    """A class whose instances are those objects that `is_one` says."""

    def __instancecheck__(cls, item: Any) -> bool:
        return bool(cls.is_one(item))  # type: ignore[attr-defined]


class AcceleratedOptimizer(metaclass=_OfPrepared):
    """A prepared optimizer. `AcceleratedOptimizer(optimizer)` gives that optimizer back; ConfigError if it is not prepared."""

    def __new__(cls, optimizer: Optimizer, device_placement: bool = True, scaler: Any = None) -> Any:
        if not cls.is_one(optimizer):
            raise ConfigError(
                f"AcceleratedOptimizer: this {type(optimizer).__name__} is not prepared. Give it to accelerator.prepare."
            )
        if scaler is not None:
            raise ConfigError("AcceleratedOptimizer: a scaler has no effect; the engine scales. Use GradScalerKwargs.")
        return optimizer

    @staticmethod
    def is_one(item: Any) -> bool:
        return is_prepared_optimizer(item)


class AcceleratedScheduler(metaclass=_OfPrepared):
    """A prepared schedule. `AcceleratedScheduler(scheduler, optimizers)` prepares it by accelerate's rules and gives it back.

    optimizers:          one or several; the schedule rests where a step of one of them was skipped.
    step_with_optimizer: False lets each call step, once.
    split_batches:       True steps once per optimizer step, False once for each rank.
    """

    def __new__(
        cls,
        scheduler: LRScheduler,
        optimizers: Optimizer | Sequence[Optimizer],
        step_with_optimizer: bool = True,
        split_batches: bool = False,
    ) -> Any:
        watched = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)

        def skipped() -> bool:
            return any(getattr(optimizer, "step_was_skipped", False) for optimizer in watched)

        times = 1 if split_batches else PartialState().num_processes
        prepare_scheduler(scheduler, Rhythm(times, step_with_optimizer, skipped))
        return scheduler

    @staticmethod
    def is_one(item: Any) -> bool:
        return isinstance(item, LRScheduler) and is_prepared(item)


def move_to_device(state: Any, device: Any) -> Any:
    """An optimizer's state with its tensors on `device`."""
    return send_to_device(state, device)
