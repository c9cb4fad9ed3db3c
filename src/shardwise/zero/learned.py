"""What the ranks have learned about the passes of training: in which order units come, and which stay over the turn.

The first forward and the first backward are negotiated, and merged into a sequence for each. From then on every pass gathers
its whole sequence on every rank. At its end the ranks ask each other, in one message, whether any needs it once more; where
gathers are plain copies from the others' memory (`peers.py`) no rank needs the others, and none asks.

    forward     embed  0  1  2  head
    backward                    head  2  1  0      with prefetch 1, 2 and head stay gathered: they are the turn
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

from ..plan.order import insert, merge
from .engine import ReductionsInFlight
from .gathers import DONE, Gathers
from .passes import HeldPass, NegotiatedPass, OrderedPass, Pass
from .unit import Unit


class Learned:
    """What is known of one model's forwards and backwards.

    forward, backward: sequences of unit indices, or None until the ranks have agreed.
    turn:              the last units of a forward that are the first of its backward: they stay gathered in between.
    """

    def __init__(self, gathers: Gathers, reductions: ReductionsInFlight, prefetch: int) -> None:
        self.gathers = gathers
        self.prefetch = prefetch
        self.forward: list[int] | None = None
        self.backward: list[int] | None = None
        self.turn: set[int] = set()
        self._reductions = reductions

    def learn_forward(self, observed: Sequence[int], used: Sequence[int], *, whole: bool) -> None:
        """Merge what each rank saw in a negotiated forward, if it was `whole` on all, into the sequence of those to come.

        observed: the units that this rank asked for, in order. used: those that its forward read, gathered or not.
        """
        everyone = self._everyone(observed, used, whole)
        if everyone is not None:
            seen = [seen for seen, _ in everyone]
            self.forward = self._completed(seen, self.gathers.gatherable, set())
            self._find_turn()
            self._reductions.bounded = all(other == seen[0] for other in seen)

    def learn_backward(self, observed: Sequence[int], used: Sequence[int], *, whole: bool) -> None:
        """The same of a negotiated backward. used: the units that the forward before it read."""
        everyone = self._everyone(observed, used, whole)
        if everyone is not None:
            # One that ran forward and was not needed (a frozen embedding, whose backward reads no weight) stays out.
            read = set().union(*(used for _, used in everyone))
            self.backward = self._completed([seen for seen, _ in everyone], self.gathers.gatherable[::-1], read)
            self._find_turn()

    def _everyone(
        self, observed: Sequence[int], used: Sequence[int], whole: bool
    ) -> list[tuple[list[int], list[int]]] | None:
        """What each rank saw and used; None if a pass was not whole on every rank."""
        said = self.gathers.ranks.gather_objects((list(observed), sorted(set(used)), whole))
        return [(seen, used) for seen, used, _ in said] if all(whole for _, _, whole in said) else None

    def _completed(self, seen: Sequence[list[int]], natural: Sequence[int], without: set[int]) -> list[int]:
        """One sequence of what the ranks saw, and of the units that no rank used, since a later pass may.

        natural: all units in the order in which this kind of pass would need them if the model ran as it is defined.
        """
        merged = merge(seen)
        for i in [i for i in natural if i not in merged and i not in without]:
            insert(merged, i, natural)
        return merged

    def _find_turn(self) -> None:
        if self.forward is not None and self.backward is not None:
            ends = 1 + self.prefetch
            self.turn = set(self.forward[-ends:]) & set(self.backward[:ends])

    def widen_turn(self, room: int) -> int:
        """More units of the turn, the last ones first, while they fit into `room` bytes; gives how many. See `Schedule`."""
        if self.forward is None or self.backward is None:
            return 0
        units, more = self.gathers.units, 0
        for i in reversed(self.forward):
            if i in self.turn or i not in self.backward:
                continue
            room -= sum(part.whole_nbytes for part in units[i].parts)
            if room < 0:
                break
            self.turn.add(i)
            more += 1
        if more:
            for i in self.turn:
                for part in units[i].parts:
                    part.fix()
        return more

    def forget(self, gone: set[int]) -> None:
        """These are never gathered again."""
        self.turn -= gone
        for sequence in (self.forward, self.backward):
            if sequence is not None:
                sequence[:] = [i for i in sequence if i not in gone]

    def agree_on_window(self, route: object) -> None:
        """Let the computation wait for reductions in this backward only if every rank used the same units in the same order.

        route: what this rank's forward did, of numbers and lists of them.
        A rank on another route may need a gather before it can take part in a reduction. If this rank's computation waited
        for that reduction, and its gathers for its computation, the ranks would wait for each other for ever. So when the
        forwards differ, the scratch memory of the whole backward is kept instead.
        """
        units, ranks = self.gathers.units, self.gathers.ranks
        scratch = sum(unit.trained.gradients.scratch_nbytes for unit in units if unit.trained is not None)
        if ranks.blocking or ranks.world_size == 1 or scratch <= self._reductions.BUDGET:
            return
        mine = zlib.crc32(repr(route).encode())
        self._reductions.bounded = len(set(ranks.gather_numbers(mine))) == 1


class TrainingAgreement:
    """What the ranks tell each other around one forward that records gradients, or one backward.

    used: the units that the forward reads, each again where another came between; of a backward, the forward before it.
    """

    def __init__(self, learned: Learned, used: Sequence[int], *, backward: bool) -> None:
        self._learned = learned
        self._gathers = learned.gathers
        self._used = used
        self._backward = backward
        self._repeats = 0  # how often this rank came back to a unit

    @property
    def _sequence(self) -> list[int] | None:
        return self._learned.backward if self._backward else self._learned.forward

    def open(self) -> Pass:
        sequence = self._sequence
        if sequence is None:
            self._gathers.drop_turn()
            return NegotiatedPass(self._gathers, self) if self._gathers.gatherable else HeldPass()
        if self._backward:
            return self._ordered(sequence, waiting=self._gathers.take_turn())
        self._gathers.drop_turn()
        self._gathers.keep_over_turn(self._learned.turn)
        return self._ordered(sequence)

    def _ordered(
        self, sequence: Sequence[int], *, waiting: Iterable[int] = (), finished: Sequence[Unit] = ()
    ) -> OrderedPass:
        prefetch = self._learned.prefetch
        return OrderedPass(self._gathers, self, sequence, prefetch, waiting=waiting, finished=finished)

    def reopen(self, ended: OrderedPass, index: int) -> Pass:
        ended.issue_rest()
        self._repeats += 1
        self._agree_to_repeat(index)
        sequence = self._sequence
        assert sequence is not None
        return self._ordered(sequence, finished=ended.finished)

    def finish(self, ended: OrderedPass) -> None:
        ended.issue_rest()
        while self._agree_to_repeat(DONE):
            self._gathers.gather_for_others(ended.sequence)
        if not self._backward:
            self._learned.agree_on_window((self._repeats, ended.skipped, list(self._used)))

    def learn(self, observed: Sequence[int], *, whole: bool) -> None:
        learn = self._learned.learn_backward if self._backward else self._learned.learn_forward
        learn(observed, self._used, whole=whole)

    def leave(self) -> None: ...

    def _agree_to_repeat(self, wanted: int) -> bool:
        """The sequence is issued: whether any rank needs it again in this walk. Units that it lacks join it, on every rank.

        wanted: the unit for which this rank needs it, or DONE. Nothing is asked where every gather is a plain copy.
        """
        sequence, gathers = self._sequence, self._gathers
        assert sequence is not None
        again, new = wanted != DONE, wanted not in (DONE, *sequence)
        alone = gathers.without_others
        if not alone:
            again, new = gathers.ranks.any_of([again, new])
        if new:
            every = {wanted} if alone else set(gathers.ranks.gather_numbers(wanted))
            natural = gathers.gatherable[::-1] if self._backward else gathers.gatherable
            for index in sorted(every - {DONE, *sequence}):
                insert(sequence, index, natural)
        return again
