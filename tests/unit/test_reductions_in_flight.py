"""The memory that reductions hold on a GPU, with the device's side replaced by a list of what it was asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from shardwise.offload.store import Done
from shardwise.ranks.lanes import Lanes
from shardwise.ranks.ranks import Ranks
from shardwise.zero.engine import ReductionsInFlight
from shardwise.zero.schedule import Phase, Schedule


class RecordingLanes:
    def __init__(self) -> None:
        self.waited: list[object] = []

    def compute_waits(self, event: object) -> None:
        self.waited.append(event)


def fill(window: ReductionsInFlight, count: int, nbytes: int) -> None:
    for number in range(count):
        window.make_room(nbytes)
        window.add(Done(cast(Any, f"reduction {number}")), torch.empty(nbytes, dtype=torch.uint8, device="meta"))


def test_large_reductions_hold_the_budget_and_the_computation_waits_for_the_oldest() -> None:
    lanes = RecordingLanes()
    window = ReductionsInFlight(cast(Lanes, lanes))
    fill(window, 5, ReductionsInFlight.BUDGET // 2)
    assert lanes.waited == ["reduction 0", "reduction 1", "reduction 2"]
    assert window.nbytes == ReductionsInFlight.BUDGET
    window.clear()
    assert lanes.waited[-1] == "reduction 4"
    assert window.nbytes == 0


def test_one_reduction_above_the_budget_waits_for_the_one_before() -> None:
    lanes = RecordingLanes()
    window = ReductionsInFlight(cast(Lanes, lanes))
    fill(window, 3, 2 * ReductionsInFlight.BUDGET)
    assert lanes.waited == ["reduction 0", "reduction 1"]


def test_small_reductions_wait_for_nothing() -> None:
    lanes = RecordingLanes()
    fill(ReductionsInFlight(cast(Lanes, lanes)), 100, 1 << 20)
    assert lanes.waited == []


def test_nothing_waits_while_ranks_are_on_different_branches() -> None:
    lanes = RecordingLanes()
    window = ReductionsInFlight(cast(Lanes, lanes))
    window.bounded = False
    fill(window, 5, ReductionsInFlight.BUDGET)
    assert lanes.waited == []


def test_reductions_of_a_cpu_hold_nothing() -> None:
    window = ReductionsInFlight(cast(Lanes, RecordingLanes()))
    window.add(Done(None), torch.zeros(1))
    assert window.nbytes == 0


class TwoRanks:
    """This rank and another, whose answer is given."""

    blocking = False
    world_size = 2

    def __init__(self, other: int | None) -> None:
        self.other = other
        self.said: list[int] = []

    def gather_numbers(self, number: int) -> list[int]:
        self.said.append(number)
        return [number, number if self.other is None else self.other]


def test_the_window_is_open_only_while_all_ranks_use_the_same_units() -> None:
    for other, bounded in ((None, True), (0, False)):
        window = ReductionsInFlight(cast(Lanes, RecordingLanes()))
        schedule = Schedule([], cast(Ranks, TwoRanks(other)), cast(Lanes, RecordingLanes()), window)
        window.BUDGET = -1  # type: ignore[misc] - so that a model without units is above it
        schedule._learned.agree_on_window([])
        assert window.bounded is bounded


def test_what_ranks_say_of_their_route_differs_by_its_order_too() -> None:
    """The same units backwards: a reduction then waits for a rank that waits for a gather behind it."""
    ranks = TwoRanks(None)
    units = [SimpleNamespace(name=str(number), leaves=False, trained=None) for number in range(3)]
    window = ReductionsInFlight(cast(Lanes, RecordingLanes()))
    schedule = Schedule(cast(Any, units), cast(Ranks, ranks), cast(Lanes, RecordingLanes()), window)
    window.BUDGET = -1  # type: ignore[misc]
    for route in ([0, 1, 2], [2, 1, 0], [0, 1, 0, 2], [0, 0, 1, 1, 2]):
        schedule.phase = Phase.FORWARD
        schedule._used = []
        for index in route:
            schedule.need(cast(Any, units[index]))
        schedule._learned.agree_on_window(schedule._used)
    straight, reversed_, looped, repeated = ranks.said
    assert len({straight, reversed_, looped}) == 3
    assert repeated == straight
