"""Which optimizers can work on flat shards: those that treat every element by itself; others may step whole parameters.

torch's own are known. Any other is tried, see `trial.py`. One that wraps another, or whose `step` was replaced on the object,
is refused, because what the engine calls is the class's `step`, on the optimizer's own groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..errors import OptimizerError
from .trial import Trial
from .ways import INSTEAD, Handling

_ELEMENTWISE = {
    "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
}  # fmt: skip
_NOT_ELEMENTWISE = {
    "LBFGS": "it takes dot products over all parameters, and calls its closure many times in a step",
    "SparseAdam": "it needs sparse gradients",
}
# torch's that look at all of one parameter at a time: Muon orthogonalises it, Adafactor has numbers for rows and columns.
_WHOLE = {"Adafactor", "Muon"}


@dataclass(frozen=True)
class Judgement:
    """How an optimizer can be stepped. trial: of one that torch does not know. all_whole: every parameter whole."""

    handling: Handling
    trial: Trial | None = None
    all_whole: bool = False

    def is_whole(self, group: int) -> bool:
        """Whether the parameters of that group are stepped whole, each on one rank."""
        return self.all_whole or (self.trial is not None and group in self.trial.wholes)


def judged(
    optimizer: Optimizer, groups: Sequence[Sequence[Tensor]], handling: Handling, device: torch.device
) -> Judgement:
    """How `optimizer` can be stepped. Raises OptimizerError for one that cannot be.

    groups: the user's parameters, by group. handling: what the plan does to them. device: where they will be stepped.
    """
    name = type(optimizer).__name__
    if _is_from_torch(optimizer) and name in _NOT_ELEMENTWISE:
        raise OptimizerError(
            f"{name} cannot work on shards: {_NOT_ELEMENTWISE[name]}, and every zero_stage holds parameters "
            f"as flat rows. {INSTEAD}"
        )
    if not _steps_as_its_class(optimizer):
        raise OptimizerError(
            f"the step of this {name} was replaced on the object (optimizer.step = ...), and a prepared optimizer steps as its "
            "class does. Write a class with that step, or replace it after prepare, around the prepared step."
        )
    if is_torchs(optimizer) or (_is_from_torch(optimizer) and name in _WHOLE):
        return Judgement(handling, all_whole=name in _WHOLE)
    trial = Trial(optimizer, handling, device)
    trial.judge(groups)
    return Judgement(handling, trial)


def steps_in_parts(optimizer: Optimizer) -> bool:
    """Whether several calls of its step, each for some of its parameters, do what one call does.

    torch's own keep everything with their parameters. Another may count its calls where no trial sees it; and hooks on the
    step, which look at all gradients or weights, would run in each call.
    """
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    return is_torchs(optimizer) and not any(hooks)


def is_torchs(optimizer: Optimizer) -> bool:
    return _is_from_torch(optimizer) and type(optimizer).__name__ in _ELEMENTWISE


def _is_from_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.split(".")[0] == "torch"


def _steps_as_its_class(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` is its class's, perhaps in the wrapper of an LR scheduler or a compiler."""
    own = getattr(type(optimizer).step, "__func__", type(optimizer).step)
    step: Any = vars(optimizer).get("step")
    if step is None:
        return True
    seen = set()
    waiting = [step]
    while waiting:
        step = waiting.pop()
        if step is own:
            return True
        if id(step) not in seen:
            seen.add(id(step))
            inside = (getattr(step, name, None) for name in ("__func__", "__wrapped__", "_torchdynamo_orig_callable"))
            waiting += [found for found in inside if found is not None]
    return False
