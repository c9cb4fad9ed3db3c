"""One call of the step of torch's own optimizers, on what their groups hold at that moment."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


def run_step(optimizer: Optimizer, *, hooks: bool = True) -> None:
    """Step what the groups hold and has a gradient.

    hooks: without them for the second and later calls of one step; torch has some for all optimizers, beside each one's own.

    torch's fused SGD takes momenta for all tensors of a call or for none. Those that begin now, as a block that has its first
    gradient, or a weight that was thawed, go in a call of their own.
    """
    first = _without_momentum(optimizer)
    if first:
        others = {id(t) for group in optimizer.param_groups for t in group["params"]} - first
        with holding(optimizer, others):
            _call(optimizer, hooks)
        with holding(optimizer, first):
            _call(optimizer, False)
    else:
        _call(optimizer, hooks)


def _call(optimizer: Optimizer, hooks: bool) -> None:
    method: Any = type(optimizer).step
    with torch.enable_grad():
        (method if hooks else unhooked(method))(optimizer)


def unhooked(method: Any) -> Any:
    """A class's method without the hooks that torch puts around `step`."""
    return method.__wrapped__ if vars(method).get("hooked") else method


def _without_momentum(optimizer: Optimizer) -> set[int]:
    """The ids of tensors that have no momentum yet, beside others that have."""
    found: set[int] = set()
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if group["momentum"] and group.get("fused"):
            stepped = [tensor for tensor in group["params"] if tensor.grad is not None]
            first = {id(t) for t in stepped if optimizer.state.get(t, {}).get("momentum_buffer") is None}
            if len(first) < len(stepped):
                found |= first
    return found


@contextmanager
def counting(optimizer: Optimizer, absent: Mapping[int, Tensor], device: torch.device) -> Iterator[None]:
    """Inside, the groups of these numbers hold a parameter of one element, with a gradient, so that they count this step.

    absent: one of what is stepped of that group elsewhere, in calls of their own or on other ranks; its dimensions count. An
    optimizer may count only where it has something to step, and this rank goes on from its own numbers, and saves them.
    """
    groups = optimizer.param_groups
    before = {number: groups[number]["params"] for number in absent}
    blanks = []
    for number, tensor in absent.items():
        blank = Parameter(torch.ones((1,) * tensor.ndim, dtype=tensor.dtype, device=device))
        blank.grad = torch.ones_like(blank)
        groups[number]["params"] = [*before[number], blank]
        blanks.append(blank)
    try:
        yield
    finally:
        for number, params in before.items():
            groups[number]["params"] = params
        for blank in blanks:
            optimizer.state.pop(blank, None)


@contextmanager
def holding(optimizer: Optimizer, tensors: Collection[int]) -> Iterator[None]:
    """Inside, the groups hold only these, given by their ids."""
    groups = optimizer.param_groups
    everything = [group["params"] for group in groups]
    for group in groups:
        group["params"] = [tensor for tensor in group["params"] if id(tensor) in tensors]
    try:
        yield
    finally:
        for group, params in zip(groups, everything, strict=True):
            group["params"] = params
