"""Who is named of ranks that wait: records in, text out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwise.ranks.activity import Activity, Doing, End, Record
from shardwise.ranks.blame import judge, named
from shardwise.ranks.board import Seen, _packed, _unpacked

NOW = 1000.0


def record(rank: int, **said: object) -> Record:
    base = Record(rank, 100 + rank, 7, "run", moved=NOW - 62, beat=NOW, steps=2, forwards=3, batches=3, iteration=1)
    return replace(base, line="train.py:41 (time.sleep(90))", **said)  # type: ignore[arg-type]


def waits(rank: int, collective: str = "all_gather", **said: object) -> Record:
    where = {"doing": Doing.FORWARD, "unit": "layers.3", **said}
    return record(rank, waits_in=collective, waits_since=NOW - 62, **where)


def test_the_one_that_does_not_wait_is_named_with_its_line():
    seen = [Seen(0, waits(0), "S"), Seen(1, record(1), "S"), Seen(2, waits(2), "S")]
    found = judge(seen, NOW)
    assert found.line == (
        "rank 1 keeps the others waiting: it is in its script, at train.py:41 (time.sleep(90)), after step 2; "
        "ranks 0, 2 wait in all_gather of unit layers.3 since 62 s."
    )
    assert found.screen.splitlines()[1].startswith("  rank 1: is in its script")
    assert named(f"{found.line}\nmore") == found.line
    assert named("something else") == ""


@pytest.mark.parametrize(
    ("odd", "state", "kills", "says"),
    [
        ({}, "T", 0, "is stopped by a signal"),
        ({}, "", 0, "was killed, or has crashed"),
        ({}, "", 1, "was killed by the kernel: memory ran out"),
        ({"end": End.ENDED, "end_code": 0}, "", 0, "left with exit code 0"),
        ({"end": End.FAILED, "end_words": "ValueError: mine"}, "", 0, "has ended with an error (ValueError: mine)"),
        ({"end": End.LEFT}, "", 0, "has left the run"),
        ({"asks": True, "asks_since": NOW - 95}, "S", 0, "waits for its data loader since 95 s, for batch 4"),
        ({"calls": "save_state", "calls_since": NOW - 9}, "S", 0, "is in save_state since 9 s"),
        ({"doing": Doing.BACKWARD, "unit": "layers.17"}, "S", 0, "computes in unit layers.17 since 62 s"),
        ({"beat": NOW - 40}, "S", 0, "does not let its interpreter go since 40 s"),
    ],
)
def test_what_it_does_is_said(odd, state, kills, says):
    found = judge([Seen(0, waits(0), "S"), Seen(1, record(1, **odd), state)], NOW, memory_kills=kills)
    assert found.culprits == (1,)
    assert found.line.startswith(f"rank 1 keeps the others waiting: it {says}")


@pytest.mark.parametrize(
    ("records", "culprit"),
    [
        ([waits(0, batches=4), waits(1, epoch_ended=True)], 1),  # fewer batches
        ([waits(0, "wait_for_everyone", doing=Doing.NONE), waits(1, forwards=4)], 1),  # an extra step
        ([waits(0), waits(1), waits(2, unit="layers.4")], 2),  # one against two
        ([waits(0), waits(1, "gather_objects", calls="gather", doing=Doing.NONE)], 1),  # alone in a call
        ([waits(0), waits(1, "gather_numbers", doing=Doing.EVALUATION)], 1),  # alone in an evaluation
        ([waits(0, doing=Doing.BACKWARD), waits(1, batches=4, forwards=4)], 1),  # it has left out a backward
        ([waits(0, "any_of", doing=Doing.BACKWARD), waits(1, "broadcast_object", doing=Doing.NONE, asks=True)], 1),
    ],
)
def test_where_all_wait_the_rules_find_one(records, culprit):
    assert judge([Seen(one.rank, one, "S") for one in records], NOW).culprits == (culprit,)
    mirrored = [replace(one, rank=len(records) - 1 - n) for n, one in enumerate(records)][::-1]
    assert judge([Seen(one.rank, one, "S") for one in mirrored], NOW).culprits == (len(records) - 1 - culprit,)


def test_nobody_is_named_where_all_wait_for_the_same():
    found = judge([Seen(0, waits(0), "S"), Seen(1, waits(1), "S")], NOW)
    assert found.culprits == ()
    assert "no rank is missing there" in found.line


def test_on_devices_the_rank_that_has_begun_the_fewest_is_behind():
    seen = [Seen(0, record(0, begun=9), "S"), Seen(1, record(1, begun=7), "S"), Seen(2, record(2, begun=9), "S")]
    assert judge(seen, NOW).culprits == (1,)


def test_a_record_is_what_was_published_and_travels_with_its_ages():
    activity = Activity()
    activity.unit("nothing is published before")
    activity.share(3, "run")
    activity.begins(Doing.FORWARD, counts=True)
    activity.unit("a long name " * 20)
    assert activity.waits("all_gather")
    assert not activity.waits("inside")
    with activity.call("save_state"), activity.call("prepare"):
        activity.loads(*activity.begins_iteration(1)[:1], 5, 0)
        found = activity.record()
    assert found is not None
    assert (found.rank, found.run, found.doing, found.waits_in, found.begun) == (
        3,
        "run",
        Doing.FORWARD,
        "all_gather",
        1,
    )
    assert (found.calls, found.batches, found.forwards, found.end) == ("save_state", 5, 1, End.NOT)
    assert found.unit.startswith("...")
    assert len(found.unit) == 80
    travelled = _unpacked(_packed(Seen(3, found, "S"), now=found.moved + 10), then=500.0 + found.moved)
    assert travelled is not None
    times = ("moved", "waits_since", "calls_since", "asks_since", "beat", "verdict_at")
    for name in times:
        then = getattr(found, name)
        assert getattr(travelled, name) == pytest.approx(then + 490.0 if then else 0.0, abs=1e-6)
    assert replace(travelled, **{name: getattr(found, name) for name in times}) == found
    activity.goes_on()
    activity.ended(End.LEFT)
    activity.ended(End.FAILED, 1)
    assert (activity.record().waits_in, activity.record().end) == ("", End.LEFT)
    activity.close()


def test_publishing_costs_about_a_microsecond():
    import timeit

    activity = Activity()
    activity.share(0, "run")

    def published() -> None:
        activity.waits("all_gather")
        activity.goes_on()

    assert min(timeit.repeat(published, number=2000, repeat=20)) / 2000 < 10e-6  # 1 us on a quiet machine
    activity.close()


def test_what_a_rank_reads_alone_moves_no_number_of_another_loaders_iterations():
    alike, other = Activity(), Activity()
    other.begins_iteration(2)
    assert alike.begins_iteration(1) == other.begins_iteration(1)
    assert alike.begins_iteration(1) == other.begins_iteration(1) != alike.begins_iteration(2)


def test_what_was_said_of_a_wait_that_is_over_is_said_no_more() -> None:
    activity = Activity()
    activity.share(0, "run")
    for collective, line in (("all_gather", "rank 1 is late"), ("barrier", "rank 2 is gone")):
        activity.waits(collective)
        activity.judged(line)
        activity.judged("what was said first holds")
        activity.goes_on()
        record = activity.record()
        assert record is not None
        assert record.last_word == line
    activity.waits("all_gather")
    record = activity.record()
    assert record is not None
    assert (record.verdict, record.last_word) == ("rank 2 is gone", "")
    activity.close()
