"""The memory that reductions hold on a GPU, with the device's side replaced by a list of what it was asked."""

from __future__ import annotations

from typing import Any, cast

import torch

from shardwise.zero.collectives import Ranks
from shardwise.zero.schedule import Schedule
from shardwise.zero.streams import Lanes
from shardwise.zero.unit import ReductionsInFlight


class RecordingLanes:
    def __init__(self) -> None:
        self.waited: list[object] = []

    def compute_waits(self, event: object) -> None:
        self.waited.append(event)


def test_the_computation_waits_for_the_reduction_before_the_last() -> None:
    lanes = RecordingLanes()
    window = ReductionsInFlight(cast(Lanes, lanes))
    for number in range(5):
        window.make_room()
        assert len(window) < ReductionsInFlight.WINDOW
        window.add(cast(Any, f"reduction {number}"), torch.zeros(1))
    assert lanes.waited == ["reduction 0", "reduction 1", "reduction 2"]
    window.clear()
    assert lanes.waited[-1] == "reduction 4"
    assert len(window) == 0


def test_nothing_waits_while_ranks_are_on_different_branches() -> None:
    lanes = RecordingLanes()
    window = ReductionsInFlight(cast(Lanes, lanes))
    window.bounded = False
    for number in range(5):
        window.make_room()
        window.add(cast(Any, f"reduction {number}"), torch.zeros(1))
    assert lanes.waited == []
    assert len(window) == 5


def test_reductions_of_a_cpu_hold_nothing() -> None:
    window = ReductionsInFlight(cast(Lanes, RecordingLanes()))
    window.add(None, torch.zeros(1))
    assert len(window) == 0


class TwoRanks:
    """This rank and another, whose answer is given."""

    blocking = False
    world_size = 2

    def __init__(self, other: int | None) -> None:
        self.other = other

    def gather_numbers(self, number: int) -> list[int]:
        return [number, number if self.other is None else self.other]


def test_the_window_is_open_only_while_all_ranks_use_the_same_units() -> None:
    for other, bounded in ((None, True), (0, False)):
        window = ReductionsInFlight(cast(Lanes, RecordingLanes()))
        schedule = Schedule([], cast(Ranks, TwoRanks(other)), cast(Lanes, RecordingLanes()), window)
        schedule._reduce_order = [0, 1, 2]
        schedule._agree_on_window()
        assert window.bounded is bounded
