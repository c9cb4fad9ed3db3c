"""What host processes say to each other arrives exactly, whatever their number, by gloo's rings and in hops.

The ranks of these tests are few, so they are told to take hops where they would take the ring.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from rig.fresh import fresh_ranks, torchrun
from shardwise.errors import RankError
from shardwise.ranks.control import Control, Ring
from shardwise.ranks.doubling import FEW, Doubling, control_over
from shardwise.ranks.ranks import Ranks

WORLDS = [1, 2, 3, 4]
WAYS: dict[str, type[Control]] = {"ring": Ring, "hops": Doubling}


@contextmanager
def talking(ranks: Ranks, way: str = "hops") -> Iterator[Ranks]:
    """Inside, the ranks exchange facts in that way."""
    usual = ranks._control
    if usual is not None:
        usual.hear_told()
        ranks._control = WAYS[way](usual.group, ranks.rank, ranks.world_size)
    try:
        yield ranks
    finally:
        if ranks._control is not None:
            ranks._control.hear_told()
        ranks._control = usual


def test_many_ranks_take_hops_and_few_the_ring():
    group: Any = None
    assert [type(control_over(group, 0, count)) for count in (2, FEW, FEW + 1, 16384)] == [
        Ring,
        Ring,
        Doubling,
        Doubling,
    ]


def _says(ranks: Ranks, way: str) -> Any:
    with talking(ranks, way):
        return _all_kinds(ranks)


def _all_kinds(ranks: Ranks) -> Any:
    rank, count = ranks.rank, ranks.world_size
    numbers = [ranks.gather_numbers(number) for number in (rank, -(2**63) + rank, 2**62 + rank)]
    only_mine = [other == rank for other in range(count)]
    flags = [
        ranks.any_of([*only_mine, False]),
        ranks.any_of([rank == count - 1]),  # the last rank knows the answer and does not wait
        ranks.any_of([False]),
        ranks.any_of([True] * 3000),
        ranks.any_of([]),
    ]
    ranks.barrier()
    said: list[Any] = [None, (rank, "x" * 20), "y" * (60 * rank), b"z" * (10_000 * rank)]
    objects = [ranks.gather_objects(value) for value in said]
    broadcast = [ranks.broadcast_object({"of": rank}, source) for source in range(count)]
    return numbers, flags, objects, broadcast


def _check(count: int, found: Any) -> None:
    ranks, (numbers, flags, objects, broadcast) = range(count), found
    assert numbers == [[rank + base for rank in ranks] for base in (0, -(2**63), 2**62)]
    assert flags == [[True] * count + [False], [True], [False], [True] * 3000, []]
    assert objects == [
        [None] * count,
        [(rank, "x" * 20) for rank in ranks],
        ["y" * (60 * rank) for rank in ranks],
        [b"z" * (10_000 * rank) for rank in ranks],
    ]
    assert broadcast == [{"of": rank} for rank in ranks]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", WORLDS)
def test_facts_arrive_exactly_on_every_rank(world, count, way):
    for found in world(count).run(_says, way):
        _check(count, found)


def _many_say() -> Any:
    ranks = Ranks.join(use_cpu=True)
    usual = type(ranks._control)
    found = _says(ranks, "hops"), _counts(ranks)
    ranks.barrier()
    ranks.leave()
    return usual, *found


@pytest.mark.parametrize("count", [5, FEW + 1])
def test_facts_of_more_ranks_arrive_exactly(count):
    """Of ranks that end with the test: a pool of so many would keep its threads."""
    hops = math.ceil(math.log2(count))
    for outcome in fresh_ranks(_many_say, torchrun(count)):
        assert outcome.value is not None, outcome
        usual, found, counts = outcome.value
        assert usual is (Ring if count <= FEW else Doubling)
        _check(count, found)
        assert counts == [hops] * 5 + [2 * hops]


class _Counting:
    """A process group that counts what is sent by it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.sent, self.recv = group, 0, group.recv

    def send(self, *arguments: Any) -> dist.Work:
        self.sent += 1
        return self.group.send(*arguments)


def _counts(ranks: Ranks) -> list[int]:
    with talking(ranks):
        control, found = ranks._control, []
        assert control is not None
        plain, counting = control.group, _Counting(control.group)
        sending: Any = counting
        control.group = sending
        for say in (
            lambda: ranks.any_of([False]),
            lambda: ranks.any_of([True]),
            ranks.barrier,
            lambda: ranks.gather_numbers(1),
            lambda: ranks.gather_objects(None),
            lambda: ranks.gather_objects("x" * 100),
        ):
            counting.sent = 0
            say()
            found.append(counting.sent)
        control.group = plain
    return found


@pytest.mark.parametrize("count", WORLDS[1:])
def test_a_message_is_one_send_for_each_doubling_of_the_ranks(world, count):
    hops = math.ceil(math.log2(count))
    assert world(count).run(_counts) == [[hops] * 5 + [2 * hops]] * count


def _told(ranks: Ranks, way: str) -> tuple[float, list[bool], list[int]]:
    with talking(ranks, way):
        ranks.barrier()
        if ranks.rank != 1:
            time.sleep(0.5)
        began = time.monotonic()
        flags = ranks.any_of([ranks.rank == 1, ranks.rank == 1])
        return time.monotonic() - began, flags, ranks.gather_numbers(ranks.rank)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_that_knows_the_answer_does_not_wait(world, count, way):
    found = world(count).run(_told, way)
    assert found[1][0] < 0.4
    assert [flags for _, flags, _ in found] == [[True, True]] * count
    assert [numbers for _, _, numbers in found] == [list(range(count))] * count


def _interrupted(ranks: Ranks, message: str) -> Any:
    with talking(ranks):
        return _interrupts_rank_0(ranks, message)


def _interrupts_rank_0(ranks: Ranks, message: str) -> Any:
    """It is interrupted while it waits for the others, who know nothing of it."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    say = {"flags": lambda: ranks.any_of([False]), "objects": lambda: ranks.gather_objects("x" * 100)}[message]
    ranks.barrier()
    came = None
    if ranks.rank == 0:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            say()
        except KeyboardInterrupt:
            came = "interrupt"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    else:
        time.sleep(0.4)
        say()
    return came, ranks.gather_numbers(ranks.rank)


@pytest.mark.parametrize("message", ["flags", "objects"])
def test_an_interrupt_does_not_part_the_ranks(world, message):
    found = world(4).run(_interrupted, message)
    assert [came for came, _ in found] == ["interrupt", None, None, None]
    assert [numbers for _, numbers in found] == [list(range(4))] * 4


def _in_another_order(ranks: Ranks, way: str) -> str:
    """Rank 1 leaves out a message. The group is one whose messages last for a second."""
    usual, ranks._timeout = ranks._timeout, timedelta(seconds=1)
    aside = ranks.aside()
    ranks._timeout = usual
    with talking(aside, way):
        try:
            if ranks.rank == 0:
                aside.any_of([False])
            aside.gather_numbers(ranks.rank)
        except RankError as error:
            return str(error)
    return "mixed up"


@pytest.mark.parametrize("way", WAYS)
def test_messages_in_another_order_meet_nobody(world, way):
    for text in world(2).run(_in_another_order, way):
        assert "and at least one did not come" in text


def _leaves(message: str, way: str, late: bool) -> list[str]:
    ranks = Ranks.join(use_cpu=True, timeout_s=2.0)
    with talking(ranks, way):
        ranks.barrier()
        if ranks.rank == 1:
            if late:
                time.sleep(4.0)
            os._exit(9)
        say = {"any_of": lambda: ranks.any_of([False]), "gather_objects": lambda: ranks.gather_objects("x" * 100)}[
            message
        ]
        found = []
        for _ in range(2):  # the second time at once
            try:
                say()
            except RankError as error:
                found.append(str(error))
        ranks._control = None
        return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("message", "late"), [("any_of", True), ("gather_objects", False)])
def test_a_rank_that_is_gone_or_does_not_come_is_told_of_alike(message, late, way):
    outcome, gone = fresh_ranks(_leaves, torchrun(2), message, way, late)
    assert gone.code == 9
    assert outcome.value is not None, outcome
    for text in outcome.value:
        assert text.startswith("rank 1 keeps the others waiting: ")
        assert f"rank 0 waited for the other ranks in {message}, and at least one did not come: " in text
    assert len(outcome.value) == 2
