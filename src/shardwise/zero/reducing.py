"""When each unit's gradients are averaged over the ranks, so that all ranks issue the same reductions in the same order.

They are reduced in one agreed order: a unit whose turn has not come waits, and what never came is filled with zeros at the
end of the backward. The order is rank 0's of the first backward; before that, the reverse of the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ranks.activity import activity
from ..ranks.ranks import Ranks
from .gradients import Grads
from .unit import Unit


class Reducing:
    """The reductions of one model's backwards.

    units:      in the order in which the model defines them.
    recomputes: whether a block that ran without a graph inside a forward that recorded one has run again: its backward is one
                of its own, and gradients may be late. Not before: without a graph also runs what is never recomputed, as an
                encoder for the batches of this rank alone, and the other ranks then do not ask which units are late.
    """

    def __init__(self, units: Sequence[Unit], ranks: Ranks) -> None:
        self._units = units
        self._ranks = ranks
        self._index = {id(unit): i for i, unit in enumerate(units)}
        self._reduce_order = [i for i, unit in enumerate(units) if unit.trained is not None][::-1]
        self._reduce_learned = False
        self._came: set[int] = set()
        self._came_in_order: list[int] = []
        self._reduced = 0
        self._late: set[int] = set()
        self.recomputes = False
        self._boundary = True

    def begin(self, boundary: bool) -> None:
        """A backward begins. boundary: it is that of the last micro-batch before a step."""
        self._boundary = boundary
        self._came.clear()
        self._late.clear()
        self._came_in_order = []
        self._reduced = 0
        for unit in self._units:
            if unit.trained is not None:
                unit.trained.gradients.expect(reduces=self._reduces, boundary=boundary)

    def complete(self, unit: Unit) -> None:
        """Every gradient of `unit` has come: reduce it, and those that waited for it, as soon as their turn is there."""
        index = self._index[id(unit)]
        if self._reduces and self._ranks.blocking:
            # Gradients wait in the parameters for the end of the backward: a rank that stood still in this reduction
            # could not answer the gather that another rank, on another branch, needs before it comes here.
            if index not in self._came:
                self._came.add(index)
                self._came_in_order.append(index)
            return
        if index in self._came:
            # Re-entrant checkpointing runs a backward of its own per segment: a module in two of them sends gradients
            # twice. The second lot waits for the end.
            self._late.add(index)
            return
        self._came.add(index)
        self._came_in_order.append(index)
        if not self._reduces:
            if unit.trained is not None:
                unit.trained.gradients.collect()
            return
        while self._reduced < len(self._reduce_order) and self._reduce_order[self._reduced] in self._came:
            self._reduce(self._reduce_order[self._reduced])
            self._reduced += 1

    @property
    def _reduces(self) -> bool:
        """Whether this backward's gradients are averaged now, or kept whole until the boundary."""
        return self._boundary or any(u.plan.gradient.sharded for u in self._units if u.trained is not None)

    def _reduce(self, index: int) -> None:
        trained = self._units[index].trained
        assert trained is not None
        activity.unit(self._units[index].name)
        trained.gradients.reduce(self._boundary)

    def flush(self) -> None:
        """The backward is over: reduce what waited, and what never came as zeros."""
        if not self._reduces:
            for i in self._reduce_order:
                trained = self._units[i].trained
                if trained is not None and (i not in self._came or i in self._late):
                    trained.gradients.collect()
            return
        for i in [*self._reduce_order[self._reduced :], *self._agreed_late()]:
            self._reduce(i)
        self._late.clear()
        if not self._reduce_learned and self._reduce_order:
            order = self._ranks.broadcast_object(self._came_in_order)
            rest = [i for i in self._reduce_order if i not in order]
            self._reduce_order = [*order, *rest]
            self._reduce_learned = True

    def _agreed_late(self) -> list[int]:
        """Units that must be reduced a second time, the same on every rank."""
        if not self.recomputes or self._ranks.blocking:
            return sorted(self._late)
        late = self._ranks.any_of([i in self._late for i in range(len(self._units))])
        return [i for i, flag in enumerate(late) if flag]

    def settle(self) -> None:
        """The boundary is reached: move reduced gradients to where they rest."""
        for unit in self._units:
            if unit.trained is not None and unit.trained.gradients.state is not Grads.EMPTY:
                unit.trained.gradients.settle()
