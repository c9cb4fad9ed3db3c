"""`DummyOptim` and `DummyScheduler`: stand for what the "optimizer" and "scheduler" sections of a DeepSpeed configuration say.

A script gives `prepare` these, with the numbers that the configuration leaves to it as "auto", and gets the real ones:

    DummyOptim(params, lr, weight_decay)                   section "optimizer"  ->  torch.optim's, or Lion
    DummyScheduler(optimizer, total steps, warmup steps)   section "scheduler"  ->  one of DeepSpeed's five, or of torch's
    DummyScheduler(optimizer, lr_scheduler_callable=f)                          ->  f(optimizer)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from ..config.environment import RankEnvironment
from ..errors import OptimizerError, PrepareError
from .deepspeed_sections import make_optimizer, make_scheduler
from .deepspeed_words import AUTO

logger = logging.getLogger("shardwise")


class DummyOptim:
    """Stands for the optimizer of the configuration.

    params:           parameters, or groups of them.
    lr, weight_decay: taken where the section says "auto"; of other names in `kwargs` likewise.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.001, weight_decay: float = 0, **kwargs: Any) -> None:
        self.params = params
        self.lr = lr
        self.weight_decay = weight_decay
        self.kwargs = kwargs
        self.made: Optimizer | None = None  # what `prepare` gave for it


class DummyScheduler:
    """Stands for the schedule of the configuration.

    optimizer:             a DummyOptim, or an optimizer.
    total_num_steps:       steps of the whole training, counted on a loader that is not prepared: of all processes.
    warmup_num_steps:      steps of the optimizer.
    lr_scheduler_callable: makes the schedule from the optimizer; it comes before the configuration's.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Optimizer], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs
        self.made: Any = None


def is_dummy_optimizer(item: Any) -> bool:
    """Also accelerate's class of this name, which a script may have from there."""
    return isinstance(item, DummyOptim) or (type(item).__name__ == "DummyOptim" and hasattr(item, "params"))


def is_dummy_scheduler(item: Any) -> bool:
    """Also accelerate's class of this name."""
    return isinstance(item, DummyScheduler) or (
        type(item).__name__ == "DummyScheduler" and hasattr(item, "lr_scheduler_callable")
    )


def made_optimizer(dummy: Any, section: Mapping[str, Any] | None) -> Optimizer:
    """The optimizer that `section` describes, over the parameters of `dummy`; the same one when asked again.

    Raises OptimizerError without a section, and ConfigError for a section that describes none.
    """
    made: Optimizer | None = getattr(dummy, "made", None)
    if made is not None:
        return made
    if section is None:
        raise OptimizerError(
            "a DummyOptim stands for the optimizer section of a DeepSpeed configuration, and there is none. Write one, or make "
            "an optimizer of torch.optim in its place."
        )
    given = {**dummy.kwargs, "lr": dummy.lr, "weight_decay": dummy.weight_decay}
    _warn_of_idle(given, section)
    chosen = [item for item in dummy.params if isinstance(item, dict) or item.requires_grad]
    made = make_optimizer(_filled(section, given), chosen)
    dummy.params, dummy.made = chosen, made
    return made


def made_scheduler(
    dummy: Any, section: Mapping[str, Any] | None, optimizers: Mapping[int, Optimizer], *, processes: int
) -> tuple[Any, dict[str, Any]]:
    """The schedule that `section` describes, over the optimizer of `dummy`, and the numbers of `dummy` for "auto" values.

    optimizers: by the id of the DummyOptim that they came from. processes: how many steps of the loader that was counted on are
                one step here.
    Raises PrepareError with neither a section nor a function, and ConfigError for a section that describes none.
    """
    made = getattr(dummy, "made", None)
    if made is not None:
        return made, {}
    optimizer = optimizers.get(id(dummy.optimizer)) or getattr(dummy.optimizer, "made", dummy.optimizer)
    if not isinstance(optimizer, Optimizer):
        raise PrepareError("a DummyScheduler is prepared before its DummyOptim. Give both to one call of `prepare`.")
    if dummy.lr_scheduler_callable is not None:
        dummy.made = dummy.lr_scheduler_callable(optimizer)
        return dummy.made, {}
    if section is None:
        raise PrepareError(
            "a DummyScheduler stands for the scheduler section of a DeepSpeed configuration, and there is none. Write one, "
            "pass lr_scheduler_callable, or make a scheduler of torch in its place."
        )
    lr = dummy.optimizer.lr if is_dummy_optimizer(dummy.optimizer) else optimizer.defaults.get("lr")
    given = {
        **dummy.kwargs,
        "warmup_min_lr": 0,
        "warmup_max_lr": lr,
        "warmup_num_steps": max(1, dummy.warmup_num_steps),
    }
    if dummy.total_num_steps is not None:
        given["total_num_steps"] = math.ceil(dummy.total_num_steps / processes)
    dummy.made = make_scheduler(_filled(section, given), optimizer)
    return dummy.made, given


def _filled(section: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    params = dict(section.get("params") or {})
    return {
        **section,
        "params": {name: given.get(name, AUTO) if value == AUTO else value for name, value in params.items()},
    }


def _warn_of_idle(given: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    """Say which numbers of a DummyOptim nobody sees: the section does not ask for them, and its optimizer has a default."""
    params, defaults = section.get("params") or {}, {"lr": 0.001, "weight_decay": 0}
    idle = [name for name, value in given.items() if name not in params and value != defaults.get(name)]
    if idle and RankEnvironment.read().rank == 0:
        logger.warning(
            "DummyOptim: %s: no effect, for the optimizer section does not say 'auto' there.", ", ".join(idle)
        )
