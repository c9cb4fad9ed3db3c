"""Norms of gradients over the ranks: what the ranks' parts of a sum are together, and the norms of single gradients that
scripts ask for, which are found for a whole model in one collective.

Every element of a gradient lies on one rank of `owners`, or on every one alike where gradients are whole; and those of `alike`
have the same. So a norm is a sum of powers over `owners`, and what is sent over all ranks may count it several times.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakMethod

import torch
from torch import Tensor

from ..errors import RankError
from ..ranks.ranks import Ranks
from .flat import FlatBuffer


def measurable(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device, in fp32 or wider; themselves where they are that.

    Another processor, or a kernel for another dtype, adds in another order: what offloads would have other bits than what does
    not. So what rests in host memory is measured on the device, and what is narrow is made wide first.
    """
    return values.to(device, torch.promote_types(values.dtype, torch.float32))


def over_owners(own: Tensor, order: float, ranks: Ranks, *, sharded: bool) -> Tensor:
    """`own` of all ranks that divide the gradients, in place: sums of powers, or largest elements for order infinity.

    sharded: each holds its own elements; False where every rank has all of them, and nothing is sent. Collective if sharded.
    """
    if sharded:
        ranks.owners.all_reduce(own, "max" if math.isinf(order) else "sum")
    return own


def addend(own: Tensor, ranks: Ranks, *, sharded: bool) -> Tensor:
    """What this rank adds to a sum over all ranks of the run for it to be the sum over one copy. own, sharded: as above."""
    alike = ranks.alike.size if sharded else ranks.world_size
    return own if alike == 1 else own / alike


def own_power(own: Tensor, together: Tensor) -> Tensor:
    """The sum of a rank that trains alone, unless that of all, `together`, is not finite: such a step is skipped on all."""
    return torch.where(torch.isfinite(together), own, together)


class _Values(Protocol):
    dtype: torch.dtype

    @property
    def version(self) -> tuple[int, int]: ...


class Normed(Protocol):
    """What is asked of a unit's gradients; `Gradients` says what each member is."""

    buffer: FlatBuffer

    @property
    def sums(self) -> _Values: ...

    def parts(self, index: int) -> list[Tensor]: ...


class Norms:
    """The norms of single gradients of one model: all of them are found together, in one collective."""

    def __init__(self, ranks: Ranks) -> None:
        self._gradients: list[Normed] = []
        self._ranks = ranks
        self._known: dict[float, tuple[Any, dict[int, Tensor]]] = {}
        self._finish: WeakMethod[Callable[[], None]] | None = None

    def before_reading(self, finish: Callable[[], None]) -> None:
        """finish: a method that ends a backward which an error has left open; what is kept of gradients counts after it."""
        self._finish = WeakMethod(finish)

    def finish_pass(self) -> None:
        """Somebody is about to read a gradient, or to change it."""
        finish = None if self._finish is None else self._finish()
        if finish is not None:
            finish()

    def count(self, gradients: Normed) -> None:
        """These belong to the model too."""
        self._gradients.append(gradients)

    def forget(self) -> None:
        """Gradients were changed. Of verbs for all ranks, on every rank: one whose part was not touched would not see it."""
        self._known.clear()

    def meet(self, what: str, name: str) -> None:
        """Raise RankError on every rank if the ranks are not about to do the same."""
        mine = zlib.crc32(f"{what} {name}".encode())
        if len(set(self._ranks.gather_numbers(mine))) > 1:
            raise RankError(
                f"rank {self._ranks.rank} asks for {what} of {name}, and another rank for something else. Gradients are "
                "sharded: reading them is collective, so every rank reads the same ones in the same order."
            )

    def of(self, gradients: Normed, index: int, order: float) -> Tensor:
        self.finish_pass()
        state = tuple(g.sums.version for g in self._gradients)
        known = self._known.get(order)
        if known is None or known[0] != state:
            self.meet(f"norms of order {order}", "gradients")
            known = self._known[order] = state, self._all(order)
        return known[1][id(gradients)][index]

    def _all(self, order: float) -> dict[int, Tensor]:
        device = self._ranks.device
        double = any(g.sums.dtype == torch.float64 for g in self._gradients)
        dtype = torch.float64 if double else torch.float32  # as torch has it
        rows = []
        for gradients in self._gradients:
            row = torch.zeros(len(gradients.buffer.members), dtype=dtype, device=device)
            for index in range(len(gradients.buffer.members)):
                for part in gradients.parts(index):
                    if part.numel():
                        own = torch.linalg.vector_norm(part.to(device, dtype), order)  # as `measurable` says
                        row[index] = own if math.isinf(order) else own**order
            rows.append(row)
        every = torch.cat(rows)
        over_owners(every, order, self._ranks, sharded=True)
        if not math.isinf(order):
            every = every ** (1.0 / order)
        sizes = [len(gradients.buffer.members) for gradients in self._gradients]
        return {id(g): row for g, row in zip(self._gradients, torch.split(every, sizes), strict=True)}
