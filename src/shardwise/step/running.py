"""One call of the step of torch's own optimizers, on what their groups hold at that moment."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer


def run_step(optimizer: Optimizer) -> None:
    """Step what the groups hold and has a gradient.

    torch's fused SGD takes momenta for all tensors of a call or for none. Those that begin now, as a block that has its first
    gradient, or a weight that was thawed, go in a call of their own.
    """
    first = _without_momentum(optimizer)
    if first:
        others = {id(t) for group in optimizer.param_groups for t in group["params"]} - first
        with holding(optimizer, others):
            _call(optimizer)
        with holding(optimizer, first):
            _call(optimizer)
    else:
        _call(optimizer)


def _call(optimizer: Optimizer) -> None:
    with torch.enable_grad():
        type(optimizer).step(optimizer)


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
