"""When each unit is gathered, released and reduced, so that all ranks issue the same collectives in the same order.

A pass is one forward of the model, or one backward. Collectives hang when ranks disagree on their order, and ranks do
disagree: one takes a branch that another does not, one stops generating earlier. So every gather follows one of two rules.

Negotiated: before a gather the ranks tell each other, over the control group, which unit each needs next; then all gather
every named unit. A rank whose pass is over keeps answering until all are done. Any order and any branch works, at about
0.1 ms a unit. The first forward and the first backward run this way.

Ordered: the ranks have merged what they saw in the negotiated pass into one sequence of all units. A rank that needs a
unit issues the sequence up to it, units that it skips included, and `prefetch` units more; at the end of the pass it
issues the rest. So each unit is gathered once per pass on every rank, whatever branch a rank takes:

    sequence     embed  0  1  2  head
    rank 0 runs  embed  0     2  head      gathers 1 on the way to 2, and keeps it until the pass ends
    rank 1 runs  embed  0  1     head      gathers 2 on the way to head

A rank that comes back to a unit behind its last turn, as in a loop that runs longer on it than before, needs the sequence once
more, and then every rank gathers it again: at the end of an ordered pass the ranks ask each other, in one message, whether
any does. Where gathers are plain copies from the others' memory (`peers.py`) no rank needs the others, and none asks.

Forwards without gradients are ordered too, with one message for each: `generation.py`.

Gradients are reduced in an order of their own: `reducing.py`. Gathers and reductions have a communicator each, so only the
order within each kind counts.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

from ..errors import ScheduleError
from ..plan.order import Order, insert, merge
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks
from .engine import Faults, ReductionsInFlight
from .generation import DONE, Rounds
from .reducing import Reducing
from .unit import Unit, Weights

log = logging.getLogger("shardwise")


class Phase(Enum):
    IDLE = auto()
    FORWARD = auto()
    BACKWARD = auto()


class Schedule:
    """The passes of one model.

    units:      in the order in which the model defines them.
    prefetch:   how many units ahead of the one in use are gathered. Shards on other tiers start one unit earlier.
    reductions: the window of reductions that the units share.
    faults:     where a failing drive is noted until the ranks agree on it, at the end of a pass.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        ranks: Ranks,
        lanes: Lanes,
        reductions: ReductionsInFlight,
        prefetch: int = 1,
        faults: Faults | None = None,
    ) -> None:
        self.ranks = ranks
        self.lanes = lanes
        self.prefetch = prefetch
        self.reductions = reductions
        self.faults = faults or Faults(ranks)
        # Ends a backward that an exception has left open; of whoever tells of backwards.
        self.end_left_backward: Callable[[], None] = lambda: self.end_backward(whole=False)
        self.renew(units)

    def renew(self, units: Sequence[Unit]) -> None:
        """These are the model's units from now on, and the ranks learn the order of the passes anew. Not inside a pass."""
        self.units = list(units)
        self.phase = Phase.IDLE
        self.index = {id(unit): i for i, unit in enumerate(self.units)}
        self._gatherable = [i for i, unit in enumerate(self.units) if unit.leaves]
        self._forward = Order()
        self._backward = Order()
        self._order: Order | None = None  # of the running pass, None when it is negotiated
        # The last units of a forward are the first of its backward: they stay gathered over the turn.
        self._turn: set[int] = set()
        self._staying = False  # whether the running forward keeps them
        self._here: set[int] = set()  # those that wait for their turn in the running backward
        self._observed: list[int] = []  # the units that this rank asked for in a negotiated pass
        self._trains = False  # whether the running forward records a graph
        self._used_in_forward: list[int] = []  # in order, each again where another came between
        self._finished: list[Unit] = []  # used, not yet released
        self._idle: dict[int, None] = {}  # gathered on the way to another unit, kept until the pass ends
        self._held = 0
        self.rounds = Rounds(self.units, self.ranks, self._negotiate)
        self._in_round = False
        self._kind = 0
        self._generating = 0
        self._lingers = False  # what is gathered stays beyond the pass: a backward recorded a graph that keeps weights
        self._until_forward = False  # and no longer than until the next forward
        self._records = False  # whether the running backward records a graph
        self.reducing = Reducing(self.units, self.ranks)
        self._rounds = 0  # how often this pass began its sequence anew

    @property
    def holds(self) -> bool:
        """Whether forwards gather and release nothing now: one without gradients has nothing to ask for."""
        return self._held > 0

    @property
    def lingers(self) -> bool:
        """Whether a graph that is still to be used keeps weights of passes that are over."""
        return self._lingers

    @property
    def forward_sequence(self) -> list[int]:
        """Unit indices in the order of a forward; empty until the ranks have agreed."""
        return self._forward.sequence or []

    # Passes.

    def begin_forward(self, trains: bool, kind: int = 0, *, stay: bool = False) -> None:
        """trains: gradients are recorded, so a backward may follow. kind: which module runs, see `Rounds.enter`.

        stay: what is gathered stays until a forward without, as for one inside of a transform whose end cannot be seen.
        No pass may be open.
        """
        if stay:
            self.linger()
        elif self._until_forward:
            self.stop_lingering()
        if trains and self._generating and not self._held:
            raise ScheduleError(
                "a forward recorded gradients while the model generates, when ranks need not be in step. Put it under "
                "torch.no_grad(), or train outside of accelerator.generation()."
            )
        self.phase = Phase.FORWARD
        self._trains = trains
        self._used_in_forward = []
        self._open(self._forward if trains else None)
        if not trains and not self._held and self._gatherable:
            self._kind = kind
            self._in_round = True
            self._order = self.rounds.enter(kind)

    def end_forward(self, *, whole: bool = True) -> None:
        """Close the pass. whole: False for one that an interrupt has ended."""
        if self.phase is not Phase.FORWARD or self.ranks.lost:  # the error that said so is on its way
            return
        self._close(self._forward if self._trains else None, whole=whole)
        self.phase = Phase.IDLE
        if not self._generating and not self._held:
            self.faults.agree()

    def begin_backward(self, boundary: bool, *, again: bool = False) -> None:
        """boundary: this is the last micro-batch before a step.

        again: the backward records a graph (create_graph=True). That graph keeps weights, so all that are gathered stay until
               a backward without has ended.
        """
        if self.phase is Phase.FORWARD:  # it runs inside of one: the ranks end that pass together first
            self._close(self._forward if self._trains else None)
        self.phase = Phase.BACKWARD
        self._records = again
        self._lingers |= again
        self._open(self._backward)
        self.reducing.begin(boundary)

    def end_backward(self, *, whole: bool = True) -> None:
        """Close the pass: gather what the sequence still holds, reduce what never came, join the lanes.

        whole: False for one that an error has ended.
        """
        # What a graph of this backward keeps is needed until one without such a graph is over.
        self._lingers = self._records or self._until_forward
        self._close(self._backward, whole=whole)
        self._reduce_rest()

    def average_sums(self) -> None:
        """A boundary without a backward, for a micro-batch that a script has dropped: average what was summed up."""
        self.reducing.begin(True)
        self._reduce_rest()

    def _reduce_rest(self) -> None:
        self.reducing.flush()
        self.lanes.compute_waits(self.lanes.reduce.mark())
        self.reductions.clear()
        self.phase = Phase.IDLE
        self.faults.agree()

    def resume_forward(self, trains: bool, units: Sequence[Unit]) -> None:
        """A backward ran inside of a forward, which goes on. units: those that it is using."""
        self.phase = Phase.FORWARD
        self._trains = trains
        self._open(self._forward if trains else None)
        for unit in units:
            self.need(unit)

    def linger(self) -> None:
        """What is gathered stays until the next forward: a graph keeps weights and does not say which."""
        self._lingers = self._until_forward = True

    def stop_lingering(self) -> None:
        """Release what stayed beyond a pass. For whoever is about to change weights, or to count memory."""
        self._lingers = self._until_forward = False
        if self.phase is Phase.IDLE and not self._held:
            for unit in self.units:
                if unit.leaves:
                    self._release(unit)

    def _open(self, order: Order | None) -> None:
        # What the optimizer wrote must be there before this pass gathers it.
        self.lanes.gather.wait(self.lanes.mark_compute())
        self._observed = []
        self._rounds = 0
        self._idle.clear()
        ordered = order is not None and order.sequence is not None and not self._held
        self._here = set()
        if order is self._backward and ordered:
            self._here = set(self._turn) if self._staying else set()
        else:
            self._drop_turn()
        self._staying = ordered and order is self._forward
        self._order = order if ordered else None
        if self._order is not None:
            self._order.restart()

    def _drop_turn(self) -> None:
        """Release what a forward kept for a backward that did not come."""
        staying, self._staying = self._staying, False
        for i in self._turn if staying else ():
            self._release(self.units[i])

    def _close(self, order: Order | None, *, whole: bool = True) -> None:
        """whole: False where this rank left it in the middle. It says to the others what it would have said at its end."""
        if self._in_round:
            self.rounds.finish(self._order, self._observed)
        elif self._order is not None:
            assert self._order.sequence is not None
            self._issue_to(len(self._order.sequence))
            while self._once_more(DONE):
                self.rounds.pass_by(self._order.sequence)
            if order is self._forward:
                self._agree_on_window()
        elif not self._held and self._gatherable:
            while not self._negotiate(DONE):
                pass
            if order is not None:
                self._learn(order, whole)
        self._finished.clear()
        self._here = set()
        # Also what nobody reported as done: the backward of a unit whose inputs need no gradient has no end of its own.
        for unit in self.units:
            if unit.leaves:
                self._release(unit)
                if self._lingers:
                    unit.settle()
        self._order = None
        if self._in_round:
            self._in_round = False
            self.rounds.leave()
            if not self._generating:  # a rank whose pass became two rounds needs the others
                self.rounds.stand_by_until_all_are_done()

    def abandon_open_pass(self) -> None:
        """If an exception left a pass open, issue what the other ranks may still issue, then forget the pass."""
        if self.phase is Phase.IDLE:
            return
        self._staying = False
        if self.phase is Phase.BACKWARD:
            self.end_left_backward()
        else:
            self.end_forward(whole=False)
        for unit in self.units:
            if unit.leaves:
                self._release(unit)
        self.lanes.join()
        self.phase = Phase.IDLE

    # Gathers.

    def need(self, unit: Unit) -> None:
        """The computation is about to read `unit`. Returns with its gather enqueued before it and the next ones behind."""
        index = self.index[id(unit)]
        if self.phase is Phase.FORWARD and self._used_in_forward[-1:] != [index]:
            self._used_in_forward.append(index)
        if not unit.leaves:
            return
        if unit in self._finished:
            self._finished.remove(unit)
        self._idle.pop(index, None)
        if self._held:
            return
        if self._in_round and unit.state is Weights.RELEASED and not self._is_ahead(index):
            self._enter_again(index)
        if self._order is None:
            self._need_negotiated(unit, index)
        else:
            self._need_ordered(unit, index, self._order)

    def _is_ahead(self, index: int) -> bool:
        """Whether a unit comes later in this pass, as far as the ranks know; in a negotiated one anything may come."""
        order = self._order
        return order is None or order.sequence is None or index in order.sequence[order.issued :]

    def _enter_again(self, index: int) -> None:
        """The rest of a forward without gradients becomes a round of its own. What it reads now stays here meanwhile."""
        assert self._order is not None
        assert self._order.sequence is not None
        unknown = index not in self._order.sequence
        self.rounds.finish(self._order, ())
        self.rounds.leave()
        self._order = self.rounds.enter(self._kind, unknown=unknown)

    def done(self, unit: Unit) -> None:
        """The computation that was enqueued has read `unit` for now. It is released when the next unit is needed."""
        if unit.leaves and unit.state is not Weights.RELEASED and unit not in self._finished:
            self._finished.append(unit)

    def _need_negotiated(self, unit: Unit, index: int) -> None:
        if unit.state is Weights.RELEASED or (index in self.rounds.kept and index not in self._observed):
            self._observed.append(index)
        self._release_finished(unit)
        while unit.state is Weights.RELEASED:
            self._negotiate(index)
        unit.arrive()

    def _negotiate(self, want: int) -> bool:
        """One round: all ranks say what they need and gather all of it. True when every rank said that it is done."""
        wants = set(self.ranks.gather_numbers(want)) - {DONE}
        for i in sorted(wants):
            if i == want:
                self.units[i].gather()
            else:
                self.rounds.pass_by([i])
        return not wants

    def _need_ordered(self, unit: Unit, index: int, order: Order) -> None:
        sequence = order.sequence
        assert sequence is not None
        ahead = [p for p in range(order.at + 1, order.issued) if sequence[p] == index]
        issued = unit.state in (Weights.GATHERING, Weights.GATHERED) and index not in self._here
        if issued and not ahead and not self._finished and order.at >= 0 and sequence[order.at] == index:
            return  # another block of the unit in use
        if issued:
            position = ahead[0] if ahead else order.at  # nothing to move
        else:
            position = self._next_turn(index, order)
        order.at = position
        self._release_finished(unit)
        self._issue_to(position + 1, wanted=index)
        unit.arrive()
        end = min(position + 1 + self.prefetch, len(sequence))
        self._issue_to(end)
        for i in sequence[order.issued : end + 1]:
            if i not in self._here:
                self.units[i].fetch()

    def _next_turn(self, index: int, order: Order) -> int:
        """The first position in the sequence, not issued yet, of a unit that has to be gathered."""
        sequence = order.sequence
        assert sequence is not None
        if index not in sequence[order.issued :]:
            # Needed again after its last turn, as when one backward covers two forwards, or for the first time, as a block
            # that had no gradients before: begin another round.
            self._issue_to(len(sequence))
            self._once_more(index)
            order.restart()
            self._rounds += 1
        return sequence.index(index, order.issued)

    def _issue_to(self, end: int, *, wanted: int | None = None) -> None:
        """Enqueue the sequence up to position `end`; what nobody has asked for yet is kept until the pass ends."""
        order = self._order
        assert order is not None
        assert order.sequence is not None
        while order.issued < end:
            i = order.sequence[order.issued]
            order.issued += 1
            other = self.units[i]
            if i in self._here:  # on every rank, since the forward: no collective
                self._here.discard(i)
                if i != wanted:
                    self._idle[i] = None
                continue
            fresh = other.state in (Weights.RELEASED, Weights.FETCHING)
            other.gather()
            if not fresh:
                other.arrive()
                if other in self._finished:
                    self._finished.remove(other)
                    self._idle[i] = None
            elif i != wanted:
                self._idle[i] = None

    def _once_more(self, wanted: int) -> bool:
        """The sequence is issued: whether any rank needs it again in this pass. Units that it lacks join it, on every rank.

        wanted: the unit for which this rank needs it, or DONE. Nothing is asked where every gather is a plain copy from the
        others' memory, which needs nobody else.
        """
        order = self._order
        assert order is not None
        assert order.sequence is not None
        again, new = wanted != DONE, wanted not in (DONE, *order.sequence)
        alone = all(part.has_peers for i in self._gatherable for part in self.units[i].parts)
        if not alone:
            again, new = self.ranks.any_of([again, new])
        if new:
            every = {wanted} if alone else set(self.ranks.gather_numbers(wanted))
            for index in sorted(every - {DONE, *order.sequence}):
                insert(order.sequence, index, self._natural(order))
        return again

    def _natural(self, order: Order) -> list[int]:
        """All units in the order in which this kind of pass would need them if the model ran as it is defined."""
        return self._gatherable[::-1] if order is self._backward else self._gatherable

    def _release_finished(self, but: Unit) -> None:
        order = self._order
        coming = order.sequence[order.at + 1 : order.issued] if order is not None and order.sequence is not None else ()
        for unit in self._finished:
            # One whose next turn is issued already stays for it.
            if unit is not but and self.index[id(unit)] not in coming:
                self._release(unit)
        self._finished = [unit for unit in self._finished if unit is but]

    def _release(self, unit: Unit) -> None:
        index = self.index[id(unit)]
        if self._staying and index in self._turn and self._trains:
            return
        self._idle.pop(index, None)
        stays = self._held or self._lingers or index in self.rounds.kept
        if unit.state is not Weights.RELEASED and not stays:
            unit.release()

    def _learn(self, order: Order, whole: bool) -> None:
        """Merge what each rank saw in a negotiated pass, if it was `whole` on all, into the sequence of the passes to come."""
        if order.sequence is not None or not self._gatherable:
            return
        everyone = self.ranks.gather_objects((self._observed, sorted(set(self._used_in_forward)), whole))
        if not all(whole for _, _, whole in everyone):
            return
        merged = merge([seen for seen, _, _ in everyone])
        used = set().union(*(used for _, used, _ in everyone))
        # A unit that no rank used may be used in a later pass. In a backward, one that ran forward and was not needed
        # (a frozen embedding, whose backward reads no weight) stays out.
        missing = [i for i in self._gatherable if i not in merged and (order is self._forward or i not in used)]
        natural = self._natural(order)
        for i in sorted(missing, key=natural.index):
            insert(merged, i, natural)
        order.sequence = merged
        if self._forward.sequence is not None and self._backward.sequence is not None:
            ends = 1 + self.prefetch
            self._turn = set(self._forward.sequence[-ends:]) & set(self._backward.sequence[:ends])
        if order is self._forward:
            self.reductions.bounded = all(seen == everyone[0][0] for seen, _, _ in everyone)

    def _agree_on_window(self) -> None:
        """Let the computation wait for reductions in this backward only if every rank used the same units in the same order.

        A rank on another route may need a gather before it can take part in a reduction. If this rank's computation waited
        for that reduction, and its gathers for its computation, the ranks would wait for each other for ever. So when the
        forwards differ, the scratch memory of the whole backward is kept instead.
        """
        scratch = sum(unit.trained.gradients.scratch_nbytes for unit in self.units if unit.trained is not None)
        if self.ranks.blocking or self.ranks.world_size == 1 or scratch <= self.reductions.BUDGET:
            return
        mine = zlib.crc32(repr((self._rounds, sorted(self._idle), self._used_in_forward)).encode())
        self.reductions.bounded = len(set(self.ranks.gather_numbers(mine))) == 1

    @contextmanager
    def hold(self, units: Sequence[Unit], *, partly: bool = False) -> Iterator[None]:
        """Collective: keep `units` gathered inside, with no collective of their own. Not inside a pass.

        partly: forwards inside gather the others; without it no forward gathers any.
        """
        self.abandon_open_pass()
        self._drop_turn()
        self.lanes.gather.wait(self.lanes.mark_compute())
        mine = [unit for unit in units if unit.leaves and unit.state is Weights.RELEASED]
        for unit in mine:
            unit.gather()
            unit.arrive()
        try:
            self.faults.agree()
            with self._streaming(mine) if partly else self._holding():
                yield
        finally:
            self._finished.clear()
            for unit in mine:
                unit.release()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextmanager
    def _streaming(self, kept: Sequence[Unit]) -> Iterator[None]:
        self.rounds.kept = frozenset(self.index[id(unit)] for unit in kept)
        try:
            yield
        finally:
            try:
                self._wait_for_all()
            finally:
                self.rounds.kept = frozenset()

    def _wait_for_all(self) -> None:
        self.abandon_open_pass()
        self.rounds.stand_by_until_all_are_done()
        self.faults.agree()

    @contextmanager
    def generating(self, choose: Callable[[], Sequence[int]]) -> Iterator[None]:
        """Collective: inside, ranks may run different numbers of forwards without gradients.

        choose: gives the units that stay gathered, the same on every rank. With all of them there is no collective inside;
        else it ends when the last rank leaves, and a rank whose sequences have ended gathers for the others. A block inside
        another one chooses nothing, but ends in the same way: what a script does behind it may be collective.
        """
        if self._held or not self._gatherable:
            yield
            return
        if self._generating:
            try:
                yield
            finally:
                self._wait_for_all()
            return
        self.abandon_open_pass()
        kept = choose()
        self._generating += 1
        try:
            with self.hold([self.units[i] for i in kept], partly=len(kept) < len(self._gatherable)):
                yield
        finally:
            self._generating -= 1

    def widen_turn(self, room: int) -> int:
        """Keep more units gathered from a forward to its backward, the last ones first, while they fit into `room` bytes.

        Their memory stays theirs between the steps as well: addresses that do not change are what CUDA graphs need.
        room: the same on every rank. Gives how many more. Not inside a pass.
        """
        forward, backward = self._forward.sequence, self._backward.sequence
        if forward is None or backward is None:
            return 0
        self.abandon_open_pass()
        self._drop_turn()
        more = 0
        for i in reversed(forward):
            if i in self._turn or i not in backward:
                continue
            room -= sum(part.whole_nbytes for part in self.units[i].parts)
            if room < 0:
                break
            self._turn.add(i)
            more += 1
        if more:
            for i in self._turn:
                for part in self.units[i].parts:
                    part.fix()
        return more

    def keep_whole(self, units: Sequence[Unit]) -> None:
        """Collective: these are gathered now and never again. Not inside a pass."""
        self.abandon_open_pass()
        self.lanes.gather.wait(self.lanes.mark_compute())
        for unit in units:
            if unit.state is not Weights.RELEASED:  # kept over a turn that did not come
                unit.release()
            unit.stay_whole()
        gone = {self.index[id(unit)] for unit in units}
        self._gatherable = [i for i in self._gatherable if i not in gone]
        self._turn -= gone
        self._here -= gone
        self.rounds.forget(gone)
        for order in (self._forward, self._backward):
            if order.sequence is not None:
                order.sequence = [i for i in order.sequence if i not in gone]
        self.faults.agree()
