"""Forwards without gradients: in which order their units come, and what stays gathered between them while a model generates.

An evaluation has passes of several kinds (an encoder runs once, its decoder for every token), and ranks do not run equally
many of them. So each such forward is a round: the ranks tell each other, in one message, the kind of pass that they begin,
and all passes that any rank begins are gathered by all. A rank whose sequences have ended, or that begins another kind, stands
by: it issues the same collectives and frees each unit at once.

    rank 0   decode   decode   decode   (done)   (done)
    rank 1   encode   decode   decode   decode   (done)
    rounds   e + d    decode   decode   decode   nobody: all go on

The units of a kind are learned in its first round, which is negotiated unit by unit; afterwards they are gathered ahead, in
order, as in training. A unit that a kind did not need before makes the rest of that pass a round of its own.

While a model generates, as many units stay gathered as the memory budget allows: all of them, and then there is nothing to
agree on, or the first ones in order. This file does not know modules, lanes or autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..plan.order import Order, merge
from ..ranks.ranks import Ranks
from .unit import Unit, Weights

DONE = -1
# Of a GPU's memory, kept free of weights under the budget "auto": keys, values and activations of the generation.
_RESERVE = 0.1


class Rounds:
    """What the ranks have agreed on about forwards without gradients.

    negotiate: one exchange of the unit that each rank needs, with its gathers; True when no rank needs any.
    kept:      indices of units that stay gathered between passes, the same on every rank.
    """

    def __init__(self, units: Sequence[Unit], ranks: Ranks, negotiate: Callable[[int], bool]) -> None:
        self._units = units
        self._ranks = ranks
        self._negotiate = negotiate
        self._sequences: dict[int, list[int]] = {}
        self._kind = 0
        self._behind: list[tuple[int, bool]] = []  # passes of this round that come after this rank's own
        self.kept: frozenset[int] = frozenset()

    def enter(self, kind: int, *, unknown: bool = False) -> Order | None:
        """Begin a pass with the others. Gives its order, or None where it is negotiated. Collective, as all here.

        kind:    of the pass: the same number for the same module on every rank.
        unknown: this pass needs a unit that its kind did not need before.
        """
        self._kind = kind
        passes = self._announce(2 * kind + unknown)
        place = [k for k, _ in passes].index(kind)
        for other in passes[:place]:
            self._stand_by(*other)
        self._behind = passes[place + 1 :]
        if passes[place][1]:
            return None
        order = Order()
        order.sequence = self._of(kind)
        return order

    def finish(self, order: Order | None, observed: Sequence[int]) -> None:
        """This rank's pass is over: gather what the others still count on. observed: the units that it needed, in order."""
        if order is None:
            while not self._negotiate(DONE):
                pass
            self._learn(self._kind, observed)
            return
        assert order.sequence is not None
        self.pass_by(order.sequence[order.issued :])
        order.issued = len(order.sequence)

    def leave(self) -> None:
        """After `finish`, with this rank's own units released: take part in the passes of the round that are left."""
        for other in self._behind:
            self._stand_by(*other)
        self._behind = []

    def stand_by_until_all_are_done(self) -> None:
        """Answer the rounds of those who still run."""
        while passes := self._announce(DONE):
            for other in passes:
                self._stand_by(*other)

    def forget(self, units: set[int]) -> None:
        """These are never gathered again."""
        self._sequences = {kind: [i for i in s if i not in units] for kind, s in self._sequences.items()}

    def _announce(self, number: int) -> list[tuple[int, bool]]:
        """The passes of this round: (kind, whether it is negotiated)."""
        unknown: dict[int, bool] = {}
        for said in self._ranks.gather_numbers(number):
            if said != DONE:
                kind = said // 2
                unknown[kind] = unknown.get(kind, kind not in self._sequences) or bool(said % 2)
        return sorted(unknown.items())

    def _of(self, kind: int) -> list[int]:
        return [i for i in self._sequences[kind] if i not in self.kept]

    def _stand_by(self, kind: int, negotiated: bool) -> None:
        if not negotiated:
            self.pass_by(self._of(kind))
            return
        while not self._negotiate(DONE):
            pass
        self._learn(kind, ())

    def pass_by(self, indices: Sequence[int]) -> None:
        """Gather units for the others' sake, one after another; what this rank reads now stays here."""
        for place, i in enumerate(indices):
            unit = self._units[i]
            here = unit.state in (Weights.GATHERING, Weights.GATHERED)
            unit.gather()
            for following in indices[place + 1 : place + 2]:
                self._units[following].fetch()
            if here:
                unit.arrive()
            else:
                unit.release()

    def _learn(self, kind: int, observed: Sequence[int]) -> None:
        seen = merge([list(s) for s in self._ranks.gather_objects(list(observed))])
        self._sequences[kind] = merge([self._sequences.get(kind, seen), seen])


def units_that_fit(
    sizes: Sequence[int], order: Sequence[int], pinned: Iterable[int], window: int, room: int
) -> list[int]:
    """The units that stay gathered within `room` bytes: all of `order`, or the first ones.

    sizes:  bytes of each unit, by index. pinned: stay in any case. window: units that come and go at one time.
    """
    if sum(sizes[i] for i in order) <= room:
        return list(order)
    kept = list(dict.fromkeys(pinned))
    rest = [i for i in order if i not in kept]
    room -= sum(sizes[i] for i in kept) + window * max((sizes[i] for i in rest), default=0)
    for i in rest:
        room -= sizes[i]
        if room < 0:
            break
        kept.append(i)
    return kept


def room_for_weights(device: torch.device, budget: int | str | None) -> int:
    """Bytes that gathered weights may take on `device`. budget: bytes, "auto" for what is free, None for as few as possible."""
    if budget is None:
        return 0
    if not isinstance(budget, str):
        return budget
    if device.type != "cuda":
        return 1 << 62
    free, total = torch.cuda.mem_get_info(device)
    # What the allocator holds and nobody uses is free too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(free - _RESERVE * total))
