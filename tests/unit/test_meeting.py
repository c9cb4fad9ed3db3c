"""Ranks meet in a store before there is a group: all are told the same, and nobody waits for one that will not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from shardwise.errors import ConfigError, RankError
from shardwise.ranks import meeting
from shardwise.ranks.meeting import Introduction, Verdict, device_index, judge, meet


def mine(n: int, host: str = "a boot", **facts: Any) -> Introduction:
    return Introduction({"shardwise version": "1", "the number of processes": n, **facts}, host)


def told(store: Any, rank: int, mine: Introduction, **more: Any) -> Verdict:
    return meet(store, rank, int(mine.facts["the number of processes"]), mine, **more)[1]


def met(*ranks: Callable[[Any], Verdict]) -> list[Verdict | Exception]:
    """What each rank's `meet` gave or raised; each runs in a thread of its own."""
    store = dist.HashStore()

    def outcome(rank: Callable[[Any], Verdict]) -> Verdict | Exception:
        try:
            return rank(store)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(outcome, ranks))


def test_ranks_that_are_alike_learn_their_places():
    said = [mine(3, "a"), mine(3, "b"), mine(3, "a")]
    verdicts = met(*(lambda store, r=r: told(store, r, said[r], timeout_s=10) for r in range(3)))
    for rank, verdict in enumerate(verdicts):
        verdict.raise_for(rank)
        assert [tuple(place) for place in verdict.places] == [(0, 2, None), (0, 1, None), (1, 2, None)]


def test_a_difference_is_one_error_on_all_ranks():
    verdicts = met(
        *(lambda store, r=r: told(store, r, mine(3, device=["cpu", "cuda"][r == 2]), timeout_s=10) for r in range(3))
    )
    for rank, verdict in enumerate(verdicts):
        with pytest.raises(
            ConfigError, match=r"^ranks 0 and 2 of this run differ: device is cpu on ranks 0-1 and cuda on rank 2"
        ):
            verdict.raise_for(rank)


def test_late_ranks_hear_of_a_failure_too():
    problem = ConfigError("no")

    def late(store: Any) -> Verdict:
        time.sleep(0.5)
        return told(store, 2, mine(3), timeout_s=60)

    began = time.monotonic()
    verdicts = met(
        lambda store: told(store, 0, mine(3), timeout_s=60),
        lambda store: told(store, 1, mine(3), timeout_s=60, problem=problem),
        late,
    )
    for rank in (0, 2):
        with pytest.raises(RankError, match="rank 1 failed: ConfigError: no"):
            verdicts[rank].raise_for(rank)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_join_tells_the_others(failing):
    problem = ConfigError("zero_stage: 5 is not one of 0, 1, 2, 3")
    verdicts = met(
        *(
            lambda store, r=r: told(store, r, mine(3), timeout_s=60, problem=problem if r == failing else None)
            for r in range(3)
        )
    )
    for rank, verdict in enumerate(verdicts):
        if rank == failing:
            verdict.raise_for(rank)  # it raises its own
        else:
            with pytest.raises(RankError, match=f"rank {failing} failed: ConfigError: zero_stage: 5"):
                verdict.raise_for(rank)


def test_a_rank_that_never_comes_is_named_in_time():
    verdicts = met(*(lambda store, r=r: told(store, r, mine(4), timeout_s=0.3) for r in (0, 2)))
    for rank, verdict in enumerate(verdicts):
        with pytest.raises(RankError, match=r"ranks 1, 3 did not join the run within 0.3 s"):
            verdict.raise_for(rank)
    (alone,) = met(lambda store: told(store, 1, mine(2), timeout_s=0.2))
    assert isinstance(alone, RankError)
    assert "rank 0 did not join" in str(alone)


def test_a_rank_that_is_waited_for_is_named_meanwhile(monkeypatch, caplog):
    monkeypatch.setattr(meeting, "_SAY_WHO_IS_MISSING_AFTER_S", 0.05)
    met(lambda store: told(store, 0, mine(2), timeout_s=0.3))
    assert [record.getMessage() for record in caplog.records] == ["Waiting for rank 1 to join the run."]


def test_two_processes_with_one_number_are_told_apart(monkeypatch):
    monkeypatch.setattr(meeting, "_LET_THE_OTHERS_READ_S", 0.5)  # rank 2 does not come
    first, *two = met(*(lambda store, r=r: told(store, r, mine(3), timeout_s=60) for r in (0, 1, 1)))
    for error in two:
        assert isinstance(error, ConfigError)
        assert "RANK 1 was given to two processes" in str(error)
    assert isinstance(first, Verdict)
    with pytest.raises(RankError, match="rank 1 failed: ConfigError: RANK 1 was given to two processes"):
        first.raise_for(0)


def left_behind(*ranks: Callable[[Any], Verdict]) -> Any:
    """A store in which these have met before."""
    store = dist.HashStore()
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda rank: rank(store), ranks))
    return store


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("problem", [None, ConfigError("of the last time")])
def test_what_an_earlier_start_left_in_the_store_is_not_believed(late, problem):
    """Several machines start their ranks again, in any order, over the launcher's one store."""

    def rank(number: int, wait_s: float, **more: Any) -> Callable[[Any], Verdict]:
        def run(store: Any) -> Verdict:
            time.sleep(wait_s)
            return told(store, number, mine(3, **more), timeout_s=20, problem=problem if more and number == 1 else None)

        return run

    store = left_behind(*(rank(number, 0.0, attempt=0) for number in range(3)))
    again = [rank(number, 0.5 if number == late else 0.0) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        verdicts = list(pool.map(lambda one: one(store), again))
    for number, verdict in enumerate(verdicts):
        verdict.raise_for(number)
        assert [tuple(place) for place in verdict.places] == [(0, 3, None), (1, 3, None), (2, 3, None)]


def test_another_versions_words_are_understood():
    later = {"facts": {"shardwise version": "9", "news": 1}, "host": "b", "mood": "good", "gpus": None}
    assert Introduction.read(later) == Introduction({"shardwise version": "9", "news": 1}, "b")
    verdict = judge([mine(2), Introduction.read(later)])
    assert verdict.problem is not None
    assert "shardwise version is 1 on rank 0 and 9 on rank 1" in verdict.problem
    assert Introduction.read({}).facts == {}


def test_devices_follow_what_each_rank_sees():
    assert [device_index(rank, ["x", "y"]) for rank in range(3)] == [0, 1, None]
    assert device_index(3, ["x"]) == 0  # a scheduler shows each process its own
    assert device_index(1, None) is None

    def seen(*gpus: list[str]) -> Verdict:
        return judge([replace(mine(len(gpus)), gpus=list(own)) for own in gpus])

    assert [place[2] for place in seen(["x", "y"], ["x", "y"]).places] == [0, 1]
    assert [place[2] for place in seen(["x"], ["y"]).places] == [0, 0]
    assert "ranks 0-1 of a would share one GPU (x)" in str(seen(["x"], ["x"]).problem)
    assert "rank 2 wants cuda:2, but this machine shows 2" in str(seen(["x", "y"], ["x", "y"], ["x", "y"]).problem)
    assert (
        judge([replace(mine(2, host), gpus=["x"]) for host in ("a", "b")]).problem is None
    )  # each machine counts by itself


def test_what_a_launcher_said_of_the_place_stands():
    said = [replace(mine(2), local_rank=1, local_world_size=2), replace(mine(2), local_rank=0, local_world_size=2)]
    assert judge(said).places == [(1, 2, None), (0, 2, None)]
