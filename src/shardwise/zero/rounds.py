"""Forwards without gradients: in which order their units come, and how ranks that run different ones stay together.

An evaluation has passes of several kinds (an encoder runs once, its decoder for every token), and ranks do not run equally
many of them. So each such forward is a round: the ranks tell each other, in one message, the kind of pass that they begin,
and all passes that any rank begins are gathered by all. A rank whose sequences have ended, or that begins another kind, stands
by: it issues the same collectives and frees each unit at once.

    rank 0   decode   decode   decode   (done)   (done)
    rank 1   encode   decode   decode   decode   (done)
    rounds   e + d    decode   decode   decode   nobody: all go on

The units of a kind are learned in its first round, which is negotiated unit by unit; afterwards they are gathered ahead, in
order, as in training. A rank that needs a unit that its kind did not need before, or that comes back to one, makes the rest of
its forward a round of its own. This file does not know modules, lanes or autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..plan.order import merge
from .gathers import DONE, Gathers
from .passes import HeldPass, NegotiatedPass, OrderedPass, Pass
from .unit import Unit


class Rounds:
    """What the ranks have agreed on about forwards without gradients."""

    def __init__(self, gathers: Gathers, prefetch: int) -> None:
        self.gathers = gathers
        self.prefetch = prefetch
        self._sequences: dict[int, list[int]] = {}  # by kind

    def sequence(self, kind: int) -> list[int]:
        """The units that a pass of this kind gathers, in order; those that are kept are here."""
        return [i for i in self._sequences[kind] if i not in self.gathers.kept]

    def announce(self, number: int) -> list[tuple[int, bool]]:
        """The passes that the ranks begin in this round: (kind, whether it is negotiated). Collective, as all that follow.

        number: DONE where this rank begins none; else twice the kind, and one more where it needs a unit that is not known.
        """
        unknown: dict[int, bool] = {}
        for said in self.gathers.ranks.gather_numbers(number):
            if said != DONE:
                kind = said // 2
                unknown[kind] = unknown.get(kind, kind not in self._sequences) or bool(said % 2)
        return sorted(unknown.items())

    def take_part_in(self, passes: Sequence[tuple[int, bool]]) -> None:
        """Gather for the ranks that run these passes."""
        for kind, negotiated in passes:
            if negotiated:
                while not self.gathers.negotiate(DONE):
                    pass
                self.learn(kind, ())
            else:
                self.gathers.gather_for_others(self.sequence(kind))

    def take_part_until_all_are_done(self) -> None:
        """Answer the rounds of those who still run."""
        while passes := self.announce(DONE):
            self.take_part_in(passes)

    def learn(self, kind: int, observed: Sequence[int]) -> None:
        """A negotiated pass of this kind is over. observed: the units that this rank needed in it, in order."""
        seen = merge([list(s) for s in self.gathers.ranks.gather_objects(list(observed))])
        self._sequences[kind] = merge([self._sequences.get(kind, seen), seen])

    def forget(self, gone: set[int]) -> None:
        """These are never gathered again."""
        for sequence in self._sequences.values():
            sequence[:] = [i for i in sequence if i not in gone]


class Round:
    """What the ranks tell each other around one forward without gradients.

    kind:  which module runs, the same number for the same module on every rank.
    waits: at the end this rank gathers for those that still run. Else somebody else sees to that, later.
    """

    def __init__(self, rounds: Rounds, kind: int, *, waits: bool) -> None:
        self._rounds = rounds
        self._gathers = rounds.gathers
        self._kind = kind
        self._waits = waits
        self._following: list[tuple[int, bool]] = []  # passes of this round that come after this rank's own

    def open(self) -> Pass:
        self._gathers.drop_turn()
        return self._begin() if self._gathers.gatherable else HeldPass()

    def reopen(self, ended: OrderedPass, index: int) -> Pass:
        """The rest of the forward becomes a round of its own. What it reads now stays here meanwhile."""
        ended.leave_rest_to_others()
        self._take_part_in_rest()
        return self._begin(unknown=index not in ended.sequence, finished=ended.finished)

    def _begin(self, *, unknown: bool = False, finished: Sequence[Unit] = ()) -> Pass:
        """unknown: this pass needs a unit that its kind did not need before."""
        rounds, kind = self._rounds, self._kind
        passes = rounds.announce(2 * kind + unknown)
        place = [k for k, _ in passes].index(kind)
        rounds.take_part_in(passes[:place])
        self._following = passes[place + 1 :]
        if passes[place][1]:
            return NegotiatedPass(self._gathers, self, finished)
        return OrderedPass(self._gathers, self, rounds.sequence(kind), rounds.prefetch, finished=finished)

    def finish(self, ended: OrderedPass) -> None:
        ended.leave_rest_to_others()

    def learn(self, observed: Sequence[int], *, whole: bool) -> None:
        self._rounds.learn(self._kind, observed)

    def leave(self) -> None:
        self._take_part_in_rest()
        if self._waits:  # a rank whose pass became two rounds needs the others
            self._rounds.take_part_until_all_are_done()

    def _take_part_in_rest(self) -> None:
        following, self._following = self._following, []
        self._rounds.take_part_in(following)
