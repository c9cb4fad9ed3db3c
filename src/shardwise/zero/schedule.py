"""When the passes of a model begin and end, and of which kind each is, so that all ranks issue the same collectives.

A pass is one forward of the model, or one backward; what happens in it is told in `passes.py`. This file opens and closes them:

    a forward that records gradients, a backward    in an order that the ranks learn in the first of each: `learned.py`
    a forward without gradients                     in a round with those of the other ranks: `rounds.py`
    any, while the weights are held                 reads what is gathered already, and asks nobody

Gradients are reduced in an order of their own: `reducing.py`. Gathers and reductions have a communicator each, so only the
order within each kind counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

from ..errors import ScheduleError
from ..ranks.activity import Doing, activity
from ..ranks.lanes import Lanes
from ..ranks.ranks import Ranks
from .engine import Faults, ReductionsInFlight
from .gathers import Gathers, Graph
from .learned import Learned, TrainingAgreement
from .passes import Agreement, HeldPass, NegotiatedPass, Pass
from .reducing import Reducing
from .rounds import Round, Rounds
from .unit import Unit, Weights


class Phase(Enum):
    IDLE = auto()
    FORWARD = auto()
    BACKWARD = auto()


class Mode(Enum):
    """What a block around passes has changed for them."""

    PLAIN = auto()
    STREAMING = auto()  # a generation whose model does not fit: ranks may run different numbers of forwards
    HELD = auto()  # what is gathered stays; nothing else is


_FORWARD, _HELD = Phase.FORWARD, Mode.HELD  # an Enum looks its members up by a call


class Lends:
    """What a script may have of weights between passes: nothing. `lending.py` has another."""

    def close(self) -> None:
        """What follows is for all ranks. Collective where weights were lent."""

    def evaluates(self, schedule: Schedule) -> None:
        """A forward without gradients begins, outside of any other."""

    def lend(self, schedule: Schedule, unit: Unit, name: str) -> bool:
        """A script reads `name`, a released weight of `unit`. Whether it is here now."""
        return False


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
        self.lending = Lends()  # what a script reads between passes
        self.mode = Mode.PLAIN
        self.renew(units)

    def renew(self, units: Sequence[Unit]) -> None:
        """These are the model's units from now on, and the ranks learn the order of the passes anew. Not inside a pass."""
        self.phase = Phase.IDLE
        self.gathers = Gathers(units, self.ranks)
        self.reducing = Reducing(self.gathers.units, self.ranks)
        self._learned = Learned(self.gathers, self.reductions, self.prefetch)
        self._rounds = Rounds(self.gathers, self.prefetch)
        self._pass: Pass | None = None  # the one that is open
        self._used: list[int] = []  # by the last forward: units in order, each again where another came between

    @property
    def units(self) -> list[Unit]:
        return self.gathers.units

    @property
    def index(self) -> dict[int, int]:
        """The place of a unit in `units`, by its id."""
        return self.gathers.index

    @property
    def holds(self) -> bool:
        """Whether forwards gather and release nothing now: one without gradients has nothing to ask for."""
        return self.mode is _HELD

    @property
    def lingers(self) -> bool:
        """Whether a graph that is still to be used keeps weights of passes that are over."""
        return bool(self.gathers.graphs)

    @property
    def forward_sequence(self) -> list[int]:
        """Unit indices in the order of a forward; empty until the ranks have agreed."""
        return self._learned.forward or []

    # Passes.

    def begin_forward(self, trains: bool, kind: int = 0, *, stay: bool = False) -> None:
        """No pass may be open. trains: gradients are recorded, so a backward may follow. kind: which module runs, see `Round`.

        stay: what is gathered stays until a forward without, as for one inside of a transform whose end cannot be seen.
        """
        if stay:
            self.linger()
        elif Graph.UNSEEN in self.gathers.graphs:
            self.stop_lingering()
        if trains and self.mode is Mode.STREAMING:
            raise ScheduleError(
                "a forward recorded gradients while the model generates, when ranks need not be in step. Put it under "
                "torch.no_grad(), or train outside of accelerator.generation()."
            )
        self.phase = Phase.FORWARD
        activity.begins(Doing.FORWARD if trains else Doing.EVALUATION, counts=trains)
        self._used = []
        if trains:
            self._open(TrainingAgreement(self._learned, self._used, backward=False))
        else:
            self._open(Round(self._rounds, kind, waits=self.mode is Mode.PLAIN))

    def end_forward(self, *, whole: bool = True) -> None:
        """Close the pass. whole: False for one that an interrupt has ended."""
        if self.phase is not Phase.FORWARD or self.ranks.lost:  # the error that said so is on its way
            return
        self._close(whole=whole)
        self.phase = Phase.IDLE
        if self.mode is Mode.PLAIN and self.gathers.gatherable:  # else no drive was read, and nobody is asked
            self.faults.agree()
        activity.begins(Doing.NONE)

    def begin_backward(self, boundary: bool, *, again: bool = False) -> None:
        """boundary: this is the last micro-batch before a step.

        again: the backward records a graph (create_graph=True). That graph keeps weights, so all that are gathered stay until
               a backward without has ended.
        """
        if self.phase is Phase.FORWARD:  # it runs inside of one: the ranks end that pass together first
            self._close()
        self.phase = Phase.BACKWARD
        activity.begins(Doing.BACKWARD)
        self.gathers.backward_begins(records=again)
        self._open(TrainingAgreement(self._learned, self._used, backward=True))
        self.reducing.begin(boundary)

    def end_backward(self, *, whole: bool = True) -> None:
        """Close the pass: gather what the sequence still holds, reduce what never came, join lanes. whole: see end_forward."""
        self.gathers.backward_ends()
        self._close(whole=whole)
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
        activity.begins(Doing.NONE)

    def resume_forward(self, trains: bool, units: Sequence[Unit]) -> None:
        """A backward ran inside of a forward, which goes on. units: those that it is using."""
        self.phase = Phase.FORWARD
        activity.begins(Doing.FORWARD if trains else Doing.EVALUATION)
        self._open(TrainingAgreement(self._learned, self._used, backward=False) if trains else None)
        for unit in units:
            self.need(unit)

    def linger(self) -> None:
        """What is gathered stays until the next forward: a graph keeps weights and does not say which."""
        self.gathers.graphs.add(Graph.UNSEEN)

    def stop_lingering(self) -> None:
        """Release what stayed beyond a pass. For whoever is about to change weights, or to count memory."""
        self.lending.close()
        self.gathers.graphs.intersection_update({Graph.RECORDING})
        if self.phase is Phase.IDLE and self.mode is not Mode.HELD:
            self.gathers.release_all()

    def _open(self, agreement: Agreement | None) -> None:
        """agreement: of the ranks around this walk; None where nothing is learned from it."""
        self.lending.close()
        # What the optimizer wrote must be there before this pass gathers it.
        self.lanes.gather.wait(self.lanes.mark_compute())
        if self.mode is Mode.HELD:
            self._pass = HeldPass()
        elif agreement is not None:
            self._pass = agreement.open()
        else:
            self.gathers.drop_turn()
            self._pass = NegotiatedPass(self.gathers) if self.gathers.gatherable else HeldPass()

    def _close(self, *, whole: bool = True) -> None:
        if self._pass is not None:
            self._pass.close(whole=whole)
            self._pass = None

    def abandon_open_pass(self) -> None:
        """If an exception left a pass open, issue what the other ranks may still issue, then forget the pass."""
        self.lending.close()
        if self.phase is Phase.IDLE:
            return
        self.gathers.take_turn()
        if self.phase is Phase.BACKWARD:
            self.end_left_backward()
        else:
            self.end_forward(whole=False)
        self._pass = None
        if self.mode is not Mode.HELD:
            self.gathers.release_all()
        self.lanes.join()
        self.phase = Phase.IDLE

    # Units.

    def need(self, unit: Unit) -> None:
        """The computation is about to read `unit`. Returns with its gather enqueued before it and the next ones behind."""
        index = self.gathers.index[id(unit)]
        activity.unit(unit.name)
        if self.phase is _FORWARD and self._used[-1:] != [index]:
            self._used.append(index)
        if unit.leaves:
            following = (self._pass or self._between_passes()).need(unit, index)
            if following is not None:
                self._pass = following
                following.need(unit, index)

    def done(self, unit: Unit) -> None:
        """The computation that was enqueued has read `unit` for now. It is released when the next unit is needed."""
        if unit.leaves and self._pass is not None:
            self._pass.done(unit)

    def _between_passes(self) -> Pass:
        """A verb has ended the forward that runs: on every rank, or on none."""
        self._pass = HeldPass() if self.mode is Mode.HELD else NegotiatedPass(self.gathers)
        return self._pass

    # Blocks.

    @contextmanager
    def hold(self, units: Sequence[Unit], *, partly: bool = False) -> Iterator[None]:
        """Collective: keep `units` gathered inside, with no collective of their own. Not inside a pass.

        partly: forwards inside gather the others; without it no forward gathers any.
        """
        self.abandon_open_pass()
        self._pass = None
        self.gathers.drop_turn()
        self.lanes.gather.wait(self.lanes.mark_compute())
        coming = self.gathers.begin_hold(units)
        mine = [unit for unit in coming if unit.state is Weights.RELEASED]
        for unit in coming:
            unit.gather()
            unit.arrive()
        try:
            self.faults.agree()
            with self._streaming(coming) if partly else self.in_mode(Mode.HELD):
                yield
        finally:
            self._pass = None
            self.gathers.end_hold(coming, mine)
            if self.mode is not Mode.HELD:  # a graph may have ended inside
                self.gathers.release_all()

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    @contextmanager
    def _streaming(self, kept: Sequence[Unit]) -> Iterator[None]:
        with self.in_mode(Mode.STREAMING), self.gathers.keeping(kept), self.gathers.exactly():  # as those that are kept
            try:
                yield
            finally:
                self._wait_for_all()

    def _wait_for_all(self) -> None:
        self.abandon_open_pass()
        self._rounds.take_part_until_all_are_done()
        self.faults.agree()

    @contextmanager
    def generating(self, choose: Callable[[], Sequence[int]]) -> Iterator[None]:
        """Collective: inside, ranks may run different numbers of forwards without gradients.

        choose: gives the units that stay gathered, the same on every rank. With all of them there is no collective inside;
        else it ends when the last rank leaves, and a rank whose sequences have ended gathers for the others. A block inside
        another one chooses nothing, but ends in the same way: what a script does behind it may be collective.
        """
        gatherable = self.gathers.gatherable
        if self.mode is Mode.HELD or not gatherable:
            yield
        elif self.mode is Mode.STREAMING:
            try:
                yield
            finally:
                self._wait_for_all()
        else:
            self.abandon_open_pass()
            kept = choose()
            with self.hold([self.units[i] for i in kept], partly=len(kept) < len(gatherable)):
                yield

    def widen_turn(self, room: int) -> int:
        """Keep more units gathered from a forward to its backward, the last ones first, while they fit into `room` bytes.

        Their memory stays theirs between the steps as well: addresses that do not change are what CUDA graphs need.
        room: the same on every rank. Gives how many more. Not inside a pass.
        """
        self.abandon_open_pass()
        self.gathers.drop_turn()
        return self._learned.widen_turn(room)

    def keep_whole(self, units: Sequence[Unit]) -> None:
        """Collective: these are gathered now and never again. Not inside a pass."""
        self.abandon_open_pass()
        self.lanes.gather.wait(self.lanes.mark_compute())
        for unit in units:
            if unit.state is not Weights.RELEASED:  # kept over a turn that did not come
                unit.release()
            unit.stay_whole()
        gone = {self.index[id(unit)] for unit in units}
        for part in (self.gathers, self._learned, self._rounds):
            part.forget(gone)
        self.faults.agree()
