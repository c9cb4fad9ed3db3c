"""The units of one model as its passes gather and release them: what all ranks gather together, and what stays here and why.

A rank takes part in every gather, also in those of units that only others need; so a gather is either for this rank, which
then reads the unit, or for the others, and then the unit goes again at once. What a pass releases may have to stay all the
same: for the backward that follows, for a graph that a script still uses, or for the next token of a generation.

This file does not know which unit comes next (`passes.py`), nor when a pass begins (`schedule.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

from ..ranks.ranks import Ranks
from .unit import Unit, Weights

DONE = -1  # in the place of a unit's index: this rank needs no unit any more
PRESENT = (Weights.GATHERED, Weights.GATHERING)


class Graph(Enum):
    """A graph that keeps weights beyond their pass without saying which."""

    RECORDING = auto()  # the running backward records one
    RECORDED = auto()  # a backward did: until one that records none has ended
    UNSEEN = auto()  # a forward's: until the next forward


class Gathers:
    """The gathers of one model.

    units:      in the order in which the model defines them; every index is a place in it. index: by the id of a unit.
    gatherable: indices of those that leave and come, in that order.
    kept:       indices of those that stay between the forwards of a generation, the same on every rank.
    graphs:     what keeps all that is gathered beyond its pass.
    """

    def __init__(self, units: Sequence[Unit], ranks: Ranks) -> None:
        self.units = list(units)
        self.ranks = ranks
        self.index = {id(unit): i for i, unit in enumerate(self.units)}
        self.gatherable = [i for i, unit in enumerate(self.units) if unit.leaves]
        self.kept: frozenset[int] = frozenset()
        self.graphs: set[Graph] = set()
        self._exact = False
        self._over_turn: frozenset[int] = frozenset()
        self._held: set[Unit] = set()  # by blocks that have begun, the same on every rank

    @property
    def without_others(self) -> bool:
        """Whether every gather is a plain copy from the others' memory, which needs no other rank."""
        return all(part.has_peers for i in self.gatherable for part in self.units[i].parts)

    def gather(self, unit: Unit) -> None:
        """For a pass: as 8-bit codes where gathers are compressed, unless it is inside of `exactly`."""
        unit.gather(exact=self._exact)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside, passes gather the very weights. The same on every rank."""
        before, self._exact = self._exact, True
        try:
            yield
        finally:
            self._exact = before

    def negotiate(self, want: int) -> bool:
        """All ranks say which unit they need, or DONE, and gather all of those. True when every rank said that it is done."""
        wants = set(self.ranks.gather_numbers(want)) - {DONE}
        for i in sorted(wants):
            if i == want:
                self.gather(self.units[i])
            else:
                self.gather_for_others([i])
        return not wants

    def gather_for_others(self, indices: Sequence[int]) -> None:
        """Gather units that this rank does not need, one after another; what it reads now stays here."""
        for place, i in enumerate(indices):
            unit = self.units[i]
            present = unit.state in PRESENT
            self.gather(unit)
            for following in indices[place + 1 : place + 2]:
                self.units[following].fetch()
            if present:
                unit.arrive()
            else:
                unit.release()

    def release(self, unit: Unit) -> None:
        """The pass has read `unit`: give its memory back, unless something keeps it."""
        if unit.state is Weights.RELEASED or self.graphs:
            return
        index = self.index[id(unit)]
        if index not in self.kept and index not in self._over_turn:
            unit.release()

    def release_all(self) -> None:
        for unit in self.units:
            if unit.leaves:
                self.release(unit)

    def close_pass(self) -> None:
        """Release what a pass has gathered. Also what nobody reported as done: a backward may have no end for a unit.

        That is one whose inputs need no gradient. What a graph keeps has arrived afterwards.
        """
        for unit in self.units:
            if unit.leaves:
                self.release(unit)
                if self.graphs:
                    unit.settle()

    # What stays from the end of a forward to its backward.

    def keep_over_turn(self, turn: Iterable[int]) -> None:
        """A forward begins: once it has gathered these they stay for the backward that follows."""
        self._over_turn = frozenset(turn)

    def take_turn(self) -> set[int]:
        """A backward begins: gives the units that are here for it, on every rank. It releases them."""
        taken, self._over_turn = self._over_turn, frozenset()
        return set(taken)

    def drop_turn(self) -> None:
        """Release what a forward kept for a backward that did not come."""
        for i in self.take_turn():
            self.release(self.units[i])

    # What stays longer.

    def begin_hold(self, units: Iterable[Unit]) -> list[Unit]:
        """A block begins in which `units` are here: gives those that have to be gathered for it on every rank. Between passes.

        Those that no block around this one holds, whatever else this rank has: a graph keeps what its rank has gathered, and
        ranks may have gathered other units, or have no graph.
        """
        coming = [unit for unit in units if unit.leaves and unit not in self._held]
        self._held.update(coming)
        return coming

    def end_hold(self, coming: Sequence[Unit], mine: Iterable[Unit]) -> None:
        """It ends. coming: what `begin_hold` gave. mine: those of them that were not here before."""
        self._held.difference_update(coming)
        for unit in mine:
            unit.release()

    @contextmanager
    def keeping(self, units: Iterable[Unit]) -> Iterator[None]:
        """Inside, these stay gathered between passes, as they are now. The same on every rank."""
        self.kept = frozenset(self.index[id(unit)] for unit in units)
        try:
            yield
        finally:
            self.kept = frozenset()

    def backward_begins(self, *, records: bool) -> None:
        """records: it records a graph (create_graph=True), which keeps weights."""
        if records:
            self.graphs.add(Graph.RECORDING)

    def backward_ends(self) -> None:
        """What a graph of this backward keeps is needed until one without such a graph is over."""
        self.graphs.discard(Graph.RECORDED)
        if Graph.RECORDING in self.graphs:
            self.graphs.remove(Graph.RECORDING)
            self.graphs.add(Graph.RECORDED)

    def forget(self, gone: set[int]) -> None:
        """These are never gathered again."""
        self.gatherable = [i for i in self.gatherable if i not in gone]
        self._over_turn -= gone
