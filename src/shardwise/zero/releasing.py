"""The end of a prepared model: its parameters get memory of their own again, in the dtype in which they came.

came in   computes in   trained: from the master     frozen: from what computes
fp32      bf16          fp32, as trained             fp32, with the values that prepare has rounded to bf16
bf16      bf16          bf16                         bf16
fp16      bf16          fp16                         fp16; bf16 where fp16 lacks one of the values
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..plan.blueprint import Member
from .flat import FlatBuffer
from .trained import Trained
from .unit import Unit

log = logging.getLogger("shardwise")


@torch.no_grad()
def dissolve(
    units: Sequence[Unit], dtypes: Mapping[str, torch.dtype], whole_master: Callable[[Trained], Tensor], *, parted: bool
) -> list[Member]:
    """Give every parameter its own memory, in its dtype of `dtypes`, by name. Collective unless the ranks have parted.

    whole_master: gathers a unit's masters. parted: nothing can be gathered, and every weight is whole on this rank.
    Gives the parameters that came with more bits than they have now: frozen ones, and trained ones whose masters are elsewhere.
    """
    rounded: list[Member] = []
    for unit in units:
        if unit.leaves:
            unit.gather()
            unit.arrive()
        if (trained := unit.trained) is not None:
            # A master that is the weight itself is whole already, and has its dtype.
            if trained.shares_weights:
                _dissolve(trained.buffer, dtypes)
            elif parted and unit.plan.optimizer.sharded:
                rounded += _dissolve(trained.buffer, dtypes)
            else:
                _dissolve(trained.buffer, dtypes, whole_master(trained))
        if unit.frozen is not None:
            rounded += _dissolve(unit.frozen, dtypes)
    return rounded


def _dissolve(buffer: FlatBuffer, dtypes: Mapping[str, torch.dtype], masters: Tensor | None = None) -> list[Member]:
    """Of one buffer, from `masters`, flat and whole, or from what computes. Gives the members that came in another dtype."""
    others = []
    buffer.guard.forget()
    for index, member in enumerate(buffer.members):
        own = buffer.view(index, masters)
        dtype = dtypes.get(member.name, own.dtype)
        found = own.to(dtype, copy=True)
        if masters is None and dtype != own.dtype:
            others.append(member)
            if not _is_same(found.to(own.dtype), own):
                found = own.clone()  # `dtype` lacks one of the values
        member.parameter.data = found
    return others


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same elements, NaN too."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def log_rounded(rounded: Sequence[Member], model: torch.nn.Module) -> None:
    """Log that these parameters of `model` do not have all the bits that they came with or were trained in."""
    if rounded:
        log.warning(
            "%d weights of this %s, the first %s, are released with the values that they computed with in %s: what they had "
            "beside them was rounded away in prepare, or is on other ranks.",
            len(rounded), type(model).__name__, rounded[0].name, rounded[0].dtype,
        )  # fmt: skip
