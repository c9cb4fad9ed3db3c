"""Passes of two and three ranks in one process: each on a route of its own, in any order of arrival.

Nobody waits for ever, all ranks gather the same units in the same order, a unit is here while it is read, and none is left.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from rig.lockstep import FakeRanks, Lockstep, StuckError, every_order, make_schedule
from shardwise.errors import ScheduleError
from shardwise.zero.schedule import Phase, Schedule
from shardwise.zero.unit import Weights

Route = Sequence[tuple[int, Any]]  # units in the order in which they are read, and the route inside of each


def straight(*indices: int) -> Route:
    return [(i, ()) for i in indices]


def drawn(source: random.Random, units: int, longest: int = 6, depth: int = 1) -> Route:
    """Units may be skipped, come back, follow themselves, and run inside of another."""
    return [
        (source.randrange(units), drawn(source, units, 3, depth - 1) if depth and source.random() < 0.3 else ())
        for _ in range(source.randrange(longest + 1))
    ]


class Model:
    """What the hooks would tell one rank's schedule, and whether what is read is there."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.reading: Counter[int] = Counter()

    def forward(self, route: Route, *, trains: bool = True, kind: int = 0, **options: bool) -> None:
        self.schedule.abandon_open_pass()
        self.schedule.begin_forward(trains, kind, **options)
        self.read(route)
        self.schedule.end_forward()

    def backward(self, route: Route, *, again: bool = False, untold: Sequence[int] = ()) -> None:
        """untold: units whose end in the backward nobody tells."""
        self.schedule.begin_backward(True, again=again)
        self.read(self.reversed(route), untold)
        self.schedule.end_backward()

    def evaluate(self, route: Route, kind: int = 0) -> None:
        self.forward(route, trains=False, kind=kind)

    def reversed(self, route: Route) -> Route:
        return [(i, self.reversed(inside)) for i, inside in reversed(route)]

    def read(self, route: Route, untold: Sequence[int] = ()) -> None:
        for i, inside in route:
            self.schedule.need(self.schedule.units[i])
            self.reading[i] += 1
            self.check()
            self.read(inside, untold)
            self.check()
            self.reading[i] -= 1
            if not self.reading[i] and i not in untold:
                self.schedule.done(self.schedule.units[i])

    def check(self) -> None:
        for i in +self.reading:
            unit = self.schedule.units[i]
            assert unit.state is Weights.GATHERED, (
                f"rank {self.schedule.ranks.rank} reads {unit.name}, {unit.state.name}"
            )
            assert all(part.guard.is_open and part.has_memory for part in unit.parts)

    @property
    def here(self) -> list[int]:
        return [i for i, unit in enumerate(self.schedule.units) if unit.state is not Weights.RELEASED]


def gathers(ranks: FakeRanks) -> list[int]:
    return [int(what[0].split()[1]) for group, what in ranks.sent if group == "gather"]


def messages(ranks: FakeRanks) -> int:
    return sum(group == "message" for group, _ in ranks.sent)


def any_rank(seed: object) -> Any:
    return random.Random(repr(seed)).choice


def first(ready: Sequence[int]) -> int:
    return ready[0]


def check_same(steps: Lockstep) -> None:
    """`Lockstep` has compared what was sent; this says that no rank has sent more."""
    assert len({len(sent) for sent in steps.sent}) == 1


def _trains_and_evaluates(ranks: FakeRanks, seed: int) -> list[int]:
    """Two forwards before a backward in some steps, evaluations between some, and units whose end nobody tells."""
    together, own = random.Random(repr(("all ranks", seed))), random.Random(repr((seed, ranks.rank)))
    units, prefetch, known = together.randrange(1, 7), together.choice([0, 1, 2, 7]), together.choice([0, 1, 3])
    travels, has_peers = together.random() < 0.5, together.random() < 0.2
    model = Model(make_schedule(ranks, units, prefetch, travels=travels, has_peers=has_peers))
    for step in range(8):
        routes = [drawn(together if step < known else own, units) for _ in range(1 + (together.random() < 0.3))]
        for route in routes:
            model.forward(route)
        for place, route in enumerate(reversed(routes)):
            if place == 0 or together.random() < 0.5:
                model.backward(route, untold=own.sample(range(units), units // 3))
                assert model.here == []
        if together.random() < 0.3:
            model.evaluate(drawn(own, units), kind=own.randrange(2))
            assert model.here == []
    return model.here


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("n", [2, 3])
def test_any_routes_of_any_ranks_meet(n: int, blocking: bool) -> None:
    for seed in range(60):
        steps = Lockstep(n, any_rank(seed), blocking=blocking)
        assert steps.run(partial(_trains_and_evaluates, seed=seed)) == [[]] * n
        check_same(steps)


def _generates_and_trains(ranks: FakeRanks, seed: int) -> list[int]:
    """What is kept stays, also where a forward breaks off; training goes on behind the block."""
    together, own = random.Random(repr(("all ranks", seed))), random.Random(repr((seed, ranks.rank)))
    units, prefetch = together.randrange(1, 7), together.choice([0, 1, 2])
    kept = together.sample(range(units), together.randrange(units + 1))
    model = Model(make_schedule(ranks, units, prefetch))
    for _ in range(2):
        with model.schedule.generating(lambda: kept):
            for _ in range(own.randrange(6)):
                model.evaluate(drawn(own, units), kind=own.randrange(3))
                assert set(model.here) == set(kept)
            if own.random() < 0.3:  # left in the middle; the next pass, or the end of the block, finds it
                model.schedule.begin_forward(False)
                model.schedule.need(model.schedule.units[0])
        assert model.here == []
        route = drawn(own, units)
        model.forward(route)
        model.backward(route)
    return model.here


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_may_generate_of_any_length_and_kind(n: int) -> None:
    for seed in range(60):
        steps = Lockstep(n, any_rank(seed))
        assert steps.run(partial(_generates_and_trains, seed=seed)) == [[]] * n
        check_same(steps)


class Mixed(Model):
    """Everything that a schedule is told, mixed: `together` is drawn alike on every rank, `own` is not."""

    def __init__(self, ranks: FakeRanks, seed: int) -> None:
        self.together, self.own = random.Random(repr(("all ranks", seed))), random.Random(repr((seed, ranks.rank)))
        units, prefetch = self.together.randrange(1, 7), self.together.choice([0, 1, 1, 2, 7])
        peers, travels = self.together.random() < 0.15, self.together.random() < 0.5
        super().__init__(make_schedule(ranks, units, prefetch, travels=travels, has_peers=peers))
        self.ranks, self.units = ranks, self.schedule.units

    def chance(self, share: float) -> bool:
        return self.together.random() < share

    def route(self) -> Route:
        return drawn(self.own, len(self.units))

    def trains(self) -> None:
        route = self.route()
        self.forward(route, stay=self.chance(0.1))
        self.backward(
            route, again=self.chance(0.1), untold=self.own.sample(range(len(self.units)), len(self.units) // 3)
        )

    def evaluates(self) -> None:
        self.evaluate(self.route(), kind=self.own.randrange(2))

    def takes_a_gradient_inside(self) -> None:
        trains = self.chance(0.7)
        self.schedule.abandon_open_pass()
        self.schedule.begin_forward(trains)
        self.read(self.route())
        self.backward(self.route(), again=self.chance(0.5))
        self.schedule.resume_forward(trains, self.units[::2])
        self.read(self.route())
        self.schedule.end_forward()
        if self.chance(0.5):
            self.backward(self.route())

    def holds(self) -> None:
        units = self.together.sample(self.units, self.together.randrange(len(self.units) + 1))
        with self.schedule.hold(units):
            assert all(unit.state is Weights.GATHERED and not unit.rounded for unit in units)
            if len(units) == len(self.units):
                self.trains()
                self.evaluates()
        if self.chance(0.3):
            self.backward(self.route())

    def generates(self) -> None:
        kept = self.together.sample(self.schedule.gathers.gatherable, self.together.randrange(len(self.units) + 1))
        before = self.ranks.gathers
        with self.schedule.generating(lambda: kept):
            for _ in range(self.own.randrange(4)):
                self.evaluates()
            if self.chance(0.3):
                with self.schedule.generating(lambda: []):
                    for _ in range(self.own.randrange(3)):
                        self.evaluates()
        assert not any(self.ranks.rounded[before:])

    def leaves_a_forward(self) -> None:
        self.schedule.abandon_open_pass()
        self.schedule.begin_forward(self.chance(0.7))
        self.read(self.route())
        self.schedule.abandon_open_pass()

    def widens_the_turn(self) -> None:
        self.schedule.widen_turn(self.together.randrange(3))

    def stops_lingering(self) -> None:
        self.schedule.stop_lingering()

    def play(self) -> list[int]:
        verbs = [self.trains] * 5 + [self.evaluates, self.takes_a_gradient_inside, self.holds, self.generates]
        verbs += [self.leaves_a_forward, self.widens_the_turn, self.stops_lingering]
        for _ in range(10):
            self.together.choice(verbs)()
        self.schedule.stop_lingering()
        self.schedule.widen_turn(0)  # drops what a forward has left for a backward
        return self.here


@pytest.mark.parametrize("n", [2, 3])
def test_blocks_graphs_and_backwards_inside_of_forwards_meet(n: int) -> None:
    for seed in range(100):
        steps = Lockstep(n, any_rank(seed), blocking=seed % 3 > 0)
        assert steps.run(partial(_mixed, seed=seed)) == [[]] * n
        check_same(steps)


def _mixed(ranks: FakeRanks, seed: int) -> list[int]:
    return Mixed(ranks, seed).play()


def test_all_ranks_gather_for_a_block_what_a_graph_keeps_on_some() -> None:
    """A backward that records a graph keeps what its rank has gathered; in a negotiated one that is what the rank used."""

    def play(ranks: FakeRanks) -> list[int]:
        model = Model(make_schedule(ranks, 3))
        model.forward(straight(0, 1, 2))
        model.backward([straight(0), straight(1, 2)][ranks.rank], again=True)
        kept = model.here
        for _ in range(2):
            with model.schedule.hold(model.schedule.units):
                assert model.here == [0, 1, 2]
            assert model.here == kept
        with model.schedule.hold(model.schedule.units):
            model.backward(straight(0, 1, 2))  # the graph ends
        assert model.here == []
        with model.schedule.hold(model.schedule.units):
            pass
        return kept

    assert Lockstep(2, first).run(play) == [[0], [1, 2]]


def _run(n: int, play: Any) -> Lockstep:
    steps = Lockstep(n, first)
    steps.run(play)
    return steps


def _in_every_order(n: int, play: Any, decisions: int) -> list[Lockstep]:
    runs = []
    for pick in every_order(decisions):
        steps = Lockstep(n, pick)
        steps.run(play)
        check_same(steps)
        runs.append(steps)
    assert len({repr(steps.sent) for steps in runs}) == 1
    return runs


def _trains_apart(ranks: FakeRanks) -> None:
    model = Model(make_schedule(ranks, 2))
    for route in (straight(0, 1), [straight(0, 1, 0), straight(1)][ranks.rank]):
        model.forward(route)
        model.backward(route)
    assert model.here == []


def _evaluates_apart(ranks: FakeRanks) -> None:
    model = Model(make_schedule(ranks, 2, prefetch=0))
    model.evaluate(straight(0, 1), kind=0)
    model.evaluate([straight(0, 1, 0), straight(1)][ranks.rank], kind=ranks.rank)
    assert model.here == []


@pytest.mark.parametrize("play", [_trains_apart, _evaluates_apart])
def test_the_order_of_arrival_changes_nothing(play: Any) -> None:
    assert len(_in_every_order(2, play, decisions=7)) == 2**7


def test_each_unit_is_gathered_once_in_a_pass_whatever_a_rank_skips() -> None:
    def play(ranks: FakeRanks) -> tuple[list[int], int]:
        model = Model(make_schedule(ranks, 5, prefetch=1))
        learned = straight(0, 1, 2, 3, 4)
        model.forward(learned)
        model.backward(learned)
        route = [straight(0, 2, 4), straight(0, 1, 4), straight()][ranks.rank]
        before = messages(ranks)
        model.forward(route)
        assert model.here == [3, 4]  # the turn
        model.backward(route)
        return gathers(ranks)[-8:], messages(ranks) - before

    # Each pass asks once whether a rank needs its sequence again.
    assert Lockstep(3, first).run(play) == [([0, 1, 2, 3, 4, 2, 1, 0], 2)] * 3


@pytest.mark.parametrize("trains", [True, False])
def test_coming_back_to_a_unit_opens_another_pass_on_every_rank(trains: bool) -> None:
    """In training and in an evaluation: the rest of the sequence comes first, then all of it once more."""

    def play(ranks: FakeRanks) -> list[int]:
        model = Model(make_schedule(ranks, 3, prefetch=0))
        model.forward(straight(0, 1, 2), trains=trains)
        before = len(gathers(ranks))
        model.schedule.begin_forward(trains)
        opened = model.schedule._pass
        model.read([straight(0, 1, 0), straight(0, 1, 2)][ranks.rank])
        assert (model.schedule._pass is opened) == (ranks.rank == 1)
        model.schedule.end_forward()
        return gathers(ranks)[before:]

    assert Lockstep(2, first).run(play) == [[0, 1, 2, 0, 1, 2]] * 2


@pytest.mark.parametrize("trains", [True, False])
def test_a_unit_that_was_never_needed_joins_the_sequence(trains: bool) -> None:
    def play(ranks: FakeRanks) -> list[list[int]]:
        model = Model(make_schedule(ranks, 3, prefetch=1))
        found = []
        for route in (straight(0, 2), straight(0, 2), straight(0, 1, 2), straight(0, 1, 2)):
            before = len(gathers(ranks))
            model.forward(route, trains=trains)
            found.append(gathers(ranks)[before:])
        return found

    for passes in Lockstep(2, any_rank(0)).run(play):
        # A training pass has every unit in its sequence; an evaluation those that its kind has needed, in that order.
        if trains:
            assert passes == [[0, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
        else:
            assert passes == [[0, 2], [0, 2], [0, 2, 1], [0, 2, 1]]


def test_nothing_is_sent_while_units_are_held() -> None:
    def play(ranks: FakeRanks) -> None:
        model = Model(make_schedule(ranks, 3))
        with model.schedule.hold(model.schedule.units):
            assert model.here == [0, 1, 2]
            before = len(ranks.sent)
            for _ in range(ranks.rank):  # one rank alone
                model.forward(straight(0, 1, 2))
                model.backward(straight(0, 1, 2))
                with model.schedule.hold(model.schedule.units[:1]):
                    model.evaluate(straight(2, 0))
            if (
                ranks.rank == 0
            ):  # an interrupt leaves a forward: what was held when it began has nobody to answer afterwards
                model.schedule.begin_forward(False)
                model.schedule.need(model.schedule.units[1])
            assert len(ranks.sent) == before
            assert model.here == [0, 1, 2]
        assert model.here == []
        model.evaluate(straight(0, 1, 2))

    check_same(_run(2, play))


def test_a_pass_that_is_left_in_the_middle_keeps_the_others_in_step() -> None:
    """On one rank; it says what it would have said at its end. Nothing is learned of such a forward."""

    def play(ranks: FakeRanks) -> None:
        model, route = Model(make_schedule(ranks, 4)), straight(0, 1, 2, 3)
        for step in range(6):
            breaks = ranks.rank == 0
            if step in (0, 2):  # an error in the forward: no rank has a backward
                if breaks:
                    model.schedule.begin_forward(True)
                    model.read(straight(0))
                    model.schedule.abandon_open_pass()
                else:
                    model.forward(route)
            else:
                model.forward(route)
                if step in (3, 4) and breaks:
                    model.schedule.begin_backward(True)
                    model.read(straight(3))
                    model.schedule.abandon_open_pass()
                else:
                    model.backward(route)
                assert model.here == []
            assert model.schedule.phase is Phase.IDLE
            assert bool(model.schedule.forward_sequence) == (step > 0)

    for seed in range(5):
        steps = Lockstep(2, any_rank(seed))
        steps.run(play)
        check_same(steps)


def test_what_a_graph_keeps_stays_until_a_backward_without_one() -> None:
    def play(ranks: FakeRanks) -> list[list[int]]:
        model, route, found = Model(make_schedule(ranks, 3)), straight(0, 1, 2), []
        for again in (True, True, False):
            model.forward(route)
            model.backward(route, again=again)
            found.append(model.here)
        model.forward(route, stay=True)
        found.append(model.here)
        model.schedule.stop_lingering()
        found.append(model.here)
        model.backward(route)
        return [*found, model.here]

    turn = [1, 2]
    assert Lockstep(2, first).run(play) == [[[0, 1, 2], [0, 1, 2], [], [0, 1, 2], turn, []]] * 2


def test_units_that_became_whole_are_gathered_no_more() -> None:
    def play(ranks: FakeRanks) -> list[int]:
        model, route = Model(make_schedule(ranks, 3)), straight(0, 1, 2)
        for _ in range(2):
            model.forward(route)
            model.backward(route)
            model.evaluate(route)
        model.schedule.keep_whole([model.schedule.units[1]])
        before = len(gathers(ranks))
        for read in (route, straight(2, 0)):
            model.schedule.begin_forward(False)
            for i, _ in read:
                model.schedule.need(model.schedule.units[i])
            model.schedule.end_forward()
        return gathers(ranks)[before:]

    for found in Lockstep(2, first).run(play):
        assert found == [0, 2, 0, 2]


def test_a_forward_that_records_gradients_while_units_stream_is_refused_on_every_rank() -> None:
    def play(ranks: FakeRanks) -> str:
        schedule = make_schedule(ranks, 2)
        with schedule.generating(lambda: [0]), pytest.raises(ScheduleError, match=r"torch\.no_grad") as caught:
            schedule.begin_forward(True)
        with schedule.generating(lambda: [0, 1]):  # nothing streams: ranks need not be in step
            schedule.begin_forward(True)
            schedule.end_forward()
        return str(caught.value)

    assert len(set(Lockstep(2, first).run(play))) == 1


def test_ranks_that_wait_for_ever_are_noticed() -> None:
    def waits(ranks: FakeRanks) -> None:
        if ranks.rank == 0:
            ranks.any_of([True])

    def differs(ranks: FakeRanks) -> None:
        ranks.any_of([True] * (1 + ranks.rank))

    for play, words in ((waits, "for ever"), (differs, "another came to")):
        with pytest.raises(StuckError, match=words):
            Lockstep(2, first).run(play)
