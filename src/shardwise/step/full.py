"""All of what the engine keeps of one trained weight, for scripts: `shardwise.full`, and `shardwise.set_full`.

    "gradient"    averaged over the ranks, between a backward and the step, without fp16's loss scale
    "master"      the fp32 weight that the optimizer changes
    "exp_avg"     or any other name: the optimizer's state of that weight, elementwise

Reading and writing are collective; the values are plain tensors on the rank's device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import LayoutError, PrepareError
from ..zero.access import gradient
from ..zero.sharded import ShardedModel
from . import intervals
from .exchange import exchange
from .intervals import Interval
from .optimizer import ShardedOptimizer

_IT = "it"  # the one label of an exchange


def full(parameter: Parameter, what: str) -> Tensor | None:
    """The whole `what` of a prepared parameter, in its shape; None where there is none. Collective.

    None is also the answer for a frozen weight, and for a state before the first step.
    """
    owner = _owner(parameter)
    if owner is None:
        if what == "gradient":
            return parameter.grad
        return parameter.detach().float() if what == "master" else None
    if what == "gradient":
        found = gradient(parameter)
        if found is None:
            return None
        scale = _scale_of(parameter)
        return found.detach().clone() if scale == 1.0 else found / scale
    return _whole(owner, _intervals(owner, parameter, what))


def set_full(parameter: Parameter, what: str, value: Tensor) -> None:
    """Write `value`, in the parameter's shape, as the whole `what` of a prepared parameter; the same on every rank. Collective.

    A master that is written is published into the weight at once. Raises PrepareError where there is nothing of that kind to be
    written, LayoutError for another shape; on every rank.
    """
    owner = _owner(parameter)
    if owner is None:
        raise PrepareError(f"set_full: a parameter of shape {tuple(parameter.shape)} is of no prepared model.")
    name = _name(owner, parameter)
    shown = gradient(parameter) if what == "gradient" else None
    own = _intervals(owner, parameter, what) if what != "gradient" else []
    there = shown is not None or owner.ranks.any_of([bool(own)])[0]
    owner.ranks.together(lambda: _check(name, parameter, what, value, there=there))
    if shown is not None:
        with torch.no_grad():
            # In the gradient's own dtype: fp16 times a loss scale of 2**16 is infinite.
            shown.copy_(value.to(shown.device, shown.dtype) * _scale_of(parameter))
        return
    owner.settle()
    flat = value.detach().reshape(-1)

    def write() -> None:
        for interval in own:
            interval.write(flat[interval.begin : interval.begin + interval.numel])

    owner.ranks.together(write)
    if what == "master":
        intervals.publish(owner)


def _check(name: str, parameter: Parameter, what: str, value: Tensor, *, there: bool) -> None:
    if tuple(value.shape) != tuple(parameter.shape):
        raise LayoutError(f"set_full: {what} of {name} has shape {tuple(parameter.shape)}, not {tuple(value.shape)}.")
    if not there and what == "gradient":
        raise PrepareError(f"set_full: {name} has no gradient now. Set it between a backward and the step.")
    if not there:
        raise PrepareError(
            f"set_full: there is no {what!r} of {name} to be written: it is frozen, or its optimizer has taken no step yet, or "
            "keeps nothing of that name."
        )


def _owner(parameter: Parameter) -> ShardedModel | None:
    return next((owner for owner in ShardedModel.all() if owner.holds(parameter)), None)


def _name(owner: ShardedModel, parameter: Parameter) -> str:
    return next(member.name for member in owner.whole.members() if member.parameter is parameter)


def _stepper(parameter: Parameter) -> ShardedOptimizer | None:
    return next((stepper for stepper in ShardedOptimizer.all() if stepper.holds([parameter])), None)


def _scale_of(parameter: Parameter) -> float:
    """What the gradients of a parameter's optimizer are multiplied by at this moment."""
    stepper = _stepper(parameter)
    if stepper is None or not stepper.scaler.enabled:
        return 1.0
    held = [trained for model in stepper.models for trained in model.trained() if trained.gradients.at_rest is not None]
    return stepper.scaler.value if held and held[0].sums.scaled else 1.0


def _intervals(owner: ShardedModel, parameter: Parameter, what: str) -> list[Interval]:
    """This rank's intervals of the parameter's master, or of a state of its optimizer."""
    owner.engine.meet()
    name = _name(owner, parameter)
    if what == "master":
        return [held for held in intervals.trained(owner) if held.name == name]
    stepper = _stepper(parameter)
    if stepper is None:
        return []
    number = next(n for n, model in enumerate(stepper.models) if model is owner)
    states = [state for state in stepper.states.intervals() if state.key == (number, name)]
    return [state.elementwise[what] for state in states if what in state.elementwise]


def _whole(owner: ShardedModel, own: list[Interval]) -> Tensor | None:
    """What the ranks' intervals are together, on the rank's device; None if no rank has any."""
    ranks = owner.ranks
    # Of what every rank keeps whole one is enough.
    mine = [(_IT, interval) for interval in own if ranks.owners.rank == 0 or not interval.copied]
    found = exchange(mine, ranks).get(_IT)
    return None if found is None else found.to(ranks.device)
