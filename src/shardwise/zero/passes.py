"""Passes: one walk over the units, a forward or a backward, as an object that is made for the walk and goes with it.

    need(unit)   the computation is about to read the unit: its gather is enqueued, and those of the next ones behind it
    done(unit)   the computation that was enqueued has read it for now: it is released when the next unit is needed
    close()      gather what the other ranks count on, and release everything

Collectives hang when ranks disagree on their order, and ranks do disagree: one takes a branch that another does not, one
stops generating earlier. So each pass is of one of three kinds.

Held: everything that it reads is gathered already and stays. Nothing is asked of anyone.

Negotiated: before a gather the ranks tell each other, over the control group, which unit each needs next; then all gather
every named unit. A rank whose pass is over keeps answering until all are done. Any order and any branch works, at about
0.1 ms a unit. The first pass of each kind runs this way, and the ranks learn from it.

Ordered: the ranks have merged what they saw in the negotiated pass into one sequence of units. A rank that needs a unit
issues the sequence up to it, units that it skips included, and `prefetch` units more; at the end of the pass it issues the
rest. So each unit is gathered once per pass on every rank, whatever branch a rank takes:

    sequence     embed  0  1  2  head
    rank 0 runs  embed  0     2  head      gathers 1 on the way to 2, and keeps it until the pass ends
    rank 1 runs  embed  0  1     head      gathers 2 on the way to head

A rank that comes back to a unit behind its last turn, as in a loop that runs longer on it than before, closes its pass and
opens another in the same walk, with what it reads still here; `need` gives that pass. Every rank takes part in it. How they
tell each other is the walk's `Agreement`: of training in `learned.py`, of forwards without gradients in `rounds.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from .gathers import DONE, PRESENT, Gathers
from .unit import Unit, Weights


class Pass(Protocol):
    """A walk over the units, from `Agreement.open` to `close`. index: of the unit, see `Gathers`."""

    def need(self, unit: Unit, index: int) -> Pass | None:
        """The unit may be read when this returns None. Else it gives the pass that goes on, which has to be asked again."""

    def done(self, unit: Unit) -> None: ...

    def close(self, *, whole: bool = True) -> None:
        """whole: False where an error or an interrupt has ended the walk on this rank. The others hear what they would at its
        end, and learn nothing from it."""


class Agreement(Protocol):
    """What the ranks tell each other around one walk. Every method is collective."""

    def open(self) -> Pass: ...

    def reopen(self, ended: OrderedPass, index: int) -> Pass:
        """This rank needs a unit that does not come any more in its pass, which ends: gives the one that begins."""

    def finish(self, ended: OrderedPass) -> None:
        """The walk is over: gather what the others count on, while what this rank has gathered is still here."""

    def learn(self, observed: Sequence[int], *, whole: bool) -> None:
        """The walk is over, and was negotiated. observed: the units that this rank asked for, in order."""

    def leave(self) -> None:
        """The walk is over, and this rank has released what it gathered."""


class HeldPass:
    """A walk in which nothing is gathered and nothing released."""

    def need(self, unit: Unit, index: int) -> None: ...

    def done(self, unit: Unit) -> None: ...

    def close(self, *, whole: bool = True) -> None: ...


class NegotiatedPass:
    """A walk in which the ranks tell each other what each needs.

    agreement: who learns from it, or None. finished: units that the pass before it in this walk has left to be released.
    """

    def __init__(self, gathers: Gathers, agreement: Agreement | None = None, finished: Sequence[Unit] = ()) -> None:
        self._gathers = gathers
        self._agreement = agreement
        self._finished = list(finished)
        self._observed: list[int] = []

    def need(self, unit: Unit, index: int) -> None:
        gathers, finished, observed = self._gathers, self._finished, self._observed
        if unit in finished:
            finished.remove(unit)
        if unit.state is Weights.RELEASED or (index in gathers.kept and index not in observed):
            observed.append(index)
        for other in finished:
            gathers.release(other)
        finished.clear()
        while unit.state is Weights.RELEASED:
            gathers.negotiate(index)
        unit.arrive()

    def done(self, unit: Unit) -> None:
        if unit.state is not Weights.RELEASED and unit not in self._finished:
            self._finished.append(unit)

    def close(self, *, whole: bool = True) -> None:
        while not self._gathers.negotiate(DONE):
            pass
        if self._agreement is not None:
            self._agreement.learn(self._observed, whole=whole)
        self._gathers.close_pass()
        if self._agreement is not None:
            self._agreement.leave()


class OrderedPass:
    """A walk along an agreed sequence.

    sequence: unit indices. prefetch: how many units ahead of the one in use are gathered; shards that rest on other tiers
              start one unit earlier.
    waiting:  units of the sequence that are here before it begins, on every rank: their first turn is no collective.
    finished: units that the pass before it in this walk has left to be released.
    """

    def __init__(
        self,
        gathers: Gathers,
        agreement: Agreement,
        sequence: Sequence[int],
        prefetch: int,
        *,
        waiting: Iterable[int] = (),
        finished: Sequence[Unit] = (),
    ) -> None:
        self.sequence = sequence
        self.finished = list(finished)
        self._gathers = gathers
        self._agreement = agreement
        self._prefetch = prefetch
        self._waiting = set(waiting)
        self._issued = 0  # how many of the sequence have been enqueued
        self._at = -1  # the position of the unit in use

    def need(self, unit: Unit, index: int) -> Pass | None:
        sequence, finished, waiting = self.sequence, self.finished, self._waiting
        if unit in finished:
            finished.remove(unit)
        if unit.state in PRESENT and index not in waiting:
            position = self._at
            ahead = sequence[position + 1 : self._issued]
            if index in ahead:
                position += 1 + ahead.index(index)
            elif not finished and position >= 0 and sequence[position] == index:
                return None  # another block of the unit in use
        elif index in sequence[self._issued :]:
            position = sequence.index(index, self._issued)
        else:
            # Needed again after its last turn, as when one backward covers two forwards, or for the first time, as a block
            # that had no gradients before.
            return self._agreement.reopen(self, index)
        self._at = position
        if finished:
            self._release_finished()
        self._issue_to(position + 1)
        unit.arrive()
        end = min(position + 1 + self._prefetch, len(sequence))
        self._issue_to(end)
        for i in sequence[self._issued : end + 1]:
            if i not in waiting:
                self._gathers.units[i].fetch()
        return None

    def done(self, unit: Unit) -> None:
        if unit.state is not Weights.RELEASED and unit not in self.finished:
            self.finished.append(unit)

    def close(self, *, whole: bool = True) -> None:
        self._agreement.finish(self)
        self._gathers.close_pass()
        self._agreement.leave()

    def issue_rest(self) -> None:
        """Enqueue the sequence to its end, and keep what it brings."""
        self._issue_to(len(self.sequence))

    def leave_rest_to_others(self) -> None:
        """Gather the sequence to its end for the others' sake, and keep nothing of it."""
        self._gathers.gather_for_others(self.sequence[self._issued :])
        self._issued = len(self.sequence)

    @property
    def skipped(self) -> list[int]:
        """What is here and nobody has asked for, or not since its last turn."""
        units = self._gathers.units
        return [i for i in self._gathers.gatherable if units[i].state in PRESENT and units[i] not in self.finished]

    def _issue_to(self, end: int) -> None:
        """Enqueue the sequence up to position `end`; what nobody has asked for yet is kept until the pass ends."""
        while self._issued < end:
            i = self.sequence[self._issued]
            self._issued += 1
            if i in self._waiting:
                self._waiting.discard(i)
                continue
            unit = self._gathers.units[i]
            present = unit.state in PRESENT
            self._gathers.gather(unit)
            if present:
                unit.arrive()
                if unit in self.finished:  # its next turn is there
                    self.finished.remove(unit)

    def _release_finished(self) -> None:
        coming = self.sequence[self._at + 1 : self._issued]
        gathers = self._gathers
        for unit in self.finished:
            # One whose next turn is issued already stays for it.
            if gathers.index[id(unit)] not in coming:
                gathers.release(unit)
        self.finished.clear()
