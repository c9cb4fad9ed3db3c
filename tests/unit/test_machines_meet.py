"""What launchers of several machines conclude from what each says, without processes; and their line, in one process."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from shardwise.cli import link as lines
from shardwise.cli import machines as meeting
from shardwise.cli.link import Link, Seat
from shardwise.cli.machines import DONE, END, FAILED, GATHER, LEFT, RUN, RUNNING, WAITING, Arrival, Chair, Said, State
from shardwise.errors import ConfigError, LaunchError


class Table:
    """A chair, launchers around it, and a clock. A launcher that `stops` is dead: its count stands."""

    def __init__(self, machines: int, max_restarts: int = 0) -> None:
        self.chair = Chair(machines, max_restarts)
        self.arrivals: list[Arrival] = []
        self.said: dict[str, Said] = {}
        self.stopped: set[str] = set()
        self.now_s = 0.0
        self._names = itertools.count()

    def come(self, machine: int, host: str | None = None, tried: int = 0, **facts: Any) -> str:
        name = f"launcher {next(self._names)}"
        self.arrivals.append(Arrival(name, machine, host or f"m{machine}", facts, tried=tried))
        self.said[name] = Said(attempt=tried)
        return name

    def tell(self, name: str, status: str, **more: Any) -> None:
        attempt = more.pop("attempt", self.said[name].attempt)
        self.said[name] = Said(status=status, attempt=attempt, beat=self.said[name].beat, **more)

    def pass_time(self, seconds: float) -> State:
        for _ in range(max(1, int(seconds))):
            self.now_s += 1
            for name, said in self.said.items():
                if name not in self.stopped:
                    values = {**said.__dict__, "beat": said.beat + 1}
                    self.said[name] = Said(**values)
            state = self.chair.look(self.now_s, self.arrivals, self.said)
        return state


def running(machines: int, max_restarts: int = 0) -> tuple[Table, list[str]]:
    table = Table(machines, max_restarts)
    names = [table.come(machine) for machine in range(machines)]
    assert table.pass_time(2).phase == RUN
    for name in names:
        table.tell(name, RUNNING)
    return table, names


def test_a_run_begins_when_all_are_there_and_ends_when_all_are_done():
    table = Table(3)
    names = [table.come(2), table.come(0)]
    assert table.pass_time(40) == State(missing=[1])
    names.append(table.come(1))
    state = table.pass_time(2)
    assert (state.phase, state.members) == (RUN, [names[1], names[2], names[0]])
    for name in names:
        table.tell(name, RUNNING)
    assert table.pass_time(300).phase == RUN
    for name in names:
        table.tell(name, DONE)
    assert table.pass_time(1) == State(END, 0, state.members)


def test_a_machine_that_never_comes_is_named_at_the_end():
    table = Table(3)
    table.come(0)
    table.come(1)
    assert table.pass_time(899).phase == GATHER
    state = table.pass_time(4)
    assert state.phase == END
    assert state.problem.startswith("machine 2 did not come within 900 s.")


def test_a_number_that_two_machines_have_ends_the_meeting():
    table = Table(2)
    for machine, host in ((0, "a"), (1, "b"), (1, "c")):
        table.come(machine, host)
    state = table.pass_time(3)
    assert state.phase == END
    assert state.problem.startswith("machine_rank 1 was given to two machines: b and c.")


def test_a_launcher_that_was_started_again_before_all_came_takes_its_place():
    table = Table(3)
    table.come(0)
    table.stopped.add(table.come(1))
    table.pass_time(1)
    again = table.come(1)
    table.come(2)
    assert table.pass_time(5).phase == GATHER  # the earlier one may be alive
    assert table.pass_time(10).members[1] == again


@pytest.mark.parametrize("key", ["shardwise version", "torch version", "num_processes", "rdzv_backend", "the script"])
def test_what_differs_is_named_with_both_values(key):
    table = Table(2)
    for machine in range(2):
        table.come(machine, **{"zero_stage": 3, key: f"value {machine}"})
    state = table.pass_time(1)
    assert state.phase == END
    assert f"{key} is value 0 on machine 0 (m0) and value 1 on machine 1 (m1)." in state.problem
    assert "zero_stage" not in state.problem


def test_what_differs_is_told_before_the_last_machine_has_come():
    table = Table(3)
    table.come(1, num_processes=3)
    table.come(2, num_processes=6)
    assert "num_processes is 3 on machine 1 (m1) and 6 on machine 2 (m2)" in table.pass_time(1).problem


def test_the_likeliest_cause_is_named_first_and_all_start_again():
    table, names = running(3, max_restarts=1)
    table.tell(names[0], FAILED, cause="rank 0: RankError", order=2)
    state = table.pass_time(3)
    assert (state.phase, state.stop) == (RUN, True)
    table.tell(names[2], FAILED, cause="rank 2: ValueError", order=1, code=7)
    table.tell(names[1], FAILED, cause="rank 1: RankError", order=2)
    state = table.pass_time(1)
    assert (state.phase, state.attempt, state.at, state.cause) == (GATHER, 1, 2, "machine 2 (m2): rank 2: ValueError")
    for name in names:
        table.tell(name, WAITING, attempt=1)
    assert table.pass_time(1).phase == RUN
    for name in names:
        table.tell(name, FAILED, attempt=1, cause="again", order=1, code=7)
    state = table.pass_time(1)
    assert (state.phase, state.code, state.cause) == (END, 7, "machine 0 (m0): again")


@pytest.mark.parametrize(("others_fail", "within_s"), [(True, 22), (False, 62)])
def test_a_machine_that_is_gone_is_the_cause(others_fail, within_s):
    table, names = running(2)
    table.stopped.add(names[1])
    if others_fail:
        table.tell(names[0], FAILED, cause="rank 0: Connection closed by peer", order=2)
    state = table.pass_time(within_s)
    if not others_fail:
        assert state.stop
        table.tell(names[0], FAILED, cause="ended", order=3)
        state = table.pass_time(1)
    assert (state.phase, state.at, state.code) == (END, 1, 1)
    assert state.cause == "machine 1 (m1) is gone: nothing was heard of its launcher."


@pytest.mark.parametrize("after_s", [0, 5, 300])
def test_a_machine_that_comes_back_is_taken_in_again(after_s):
    table, names = running(2, max_restarts=2)
    table.stopped.add(names[1])
    if after_s:
        table.pass_time(1)
        table.tell(names[0], FAILED, cause="rank 0: Connection closed by peer", order=2)
        table.pass_time(after_s)
    again = table.come(1)
    state = table.pass_time(15)
    if not after_s:  # nothing but its coming says that the earlier one is gone
        assert state.stop
        table.tell(names[0], FAILED, cause="ended", order=3)
        table.pass_time(1)
    assert table.pass_time(1).cause.startswith("machine 1 (m1) is gone")
    for name in (names[0], again):
        table.tell(name, WAITING, attempt=1)
    state = table.pass_time(2)
    assert (state.phase, state.attempt, state.members) == (RUN, 1, [names[0], again])


def test_a_launcher_that_comes_for_a_place_that_is_taken_is_refused_alone():
    table, _ = running(2)
    other = table.come(1, "elsewhere")
    state = table.pass_time(70)
    assert (state.phase, state.stop) == (RUN, False)
    assert state.refused == {other: "machine_rank 1 is taken by m1, whose ranks are running."}


def test_a_machine_that_was_stopped_ends_the_run_without_a_restart():
    table, names = running(2, max_restarts=5)
    table.tell(names[1], FAILED, cause="it was stopped by SIGINT", code=130, final=True)
    table.tell(names[0], FAILED, cause="rank 0: Connection closed", order=1)
    state = table.pass_time(1)
    assert (state.phase, state.code, state.cause) == (END, 130, "machine 1 (m1): it was stopped by SIGINT")


def test_attempts_go_on_where_machine_0_was_started_again():
    table = Table(2, max_restarts=2)
    first, second = table.come(0), table.come(1, tried=2)
    assert table.pass_time(1).attempt == 2
    table.tell(first, WAITING, attempt=2)
    table.tell(second, WAITING, attempt=2)
    assert table.pass_time(1).phase == RUN
    assert "3 attempts have failed" in Table.pass_time(_tried_too_often(), 1).problem


def _tried_too_often() -> Table:
    table = Table(2, max_restarts=2)
    table.come(0)
    table.come(1, tried=3)
    return table


def test_all_have_left_when_each_has_read_the_end_or_is_dead():
    table, names = running(2)
    table.tell(names[0], LEFT)
    table.pass_time(1)
    assert not table.chair.all_have_left()
    table.stopped.add(names[1])
    table.pass_time(12)
    assert table.chair.all_have_left()


# The line: two launchers in this process, with the store between them.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "TICK_S", 0.05)
    monkeypatch.setattr(lines, "LET_RANKS_END_S", 0.1)
    monkeypatch.setattr(meeting, "SAY_WHO_IS_MISSING_AFTER_S", 0.5)
    monkeypatch.setattr(meeting, "CONNECT_WITHIN_S", 2.0)


def seats(count: int, max_restarts: int = 0) -> list[Seat]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Seat(machine, count, "127.0.0.1", port, max_restarts) for machine in range(count)]


def together(*actions: Callable[[], Any]) -> list[Any]:
    """What each gives, or the error that it raises, at one time."""
    found: list[Any] = [None] * len(actions)

    def run(place: int) -> None:
        try:
            found[place] = actions[place]()
        except (ConfigError, LaunchError) as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def one_run(link: Link, endings: list[dict[str, Any]]) -> Any:
    try:
        link.open()
        for ending in endings:
            attempt = link.start()
            link.report(**ending)
            state = link.settled()
            if state is None or state.phase == END:
                return attempt, state
        return None
    finally:
        link.close()


def test_two_launchers_run_fail_and_run_again(quick):
    here, there = seats(2, max_restarts=1)
    first, second = (Link(seat, {"key": 1}, {}, list) for seat in (here, there))
    fails = {"status": FAILED, "cause": "rank 1: ValueError", "order": 1}
    found = together(
        lambda: one_run(first, [{"status": DONE}, {"status": DONE}]),
        lambda: one_run(second, [fails, {"status": DONE}]),
    )
    assert [(attempt, state.phase, state.code) for attempt, state in found] == [(1, END, 0)] * 2


def test_two_launchers_with_other_settings_raise_the_same(quick):
    first, second = (Link(seat, {"zero_stage": seat.machine}, {}, list) for seat in seats(2))
    done = [{"status": DONE}]
    errors = together(lambda: one_run(first, done), lambda: one_run(second, done))
    assert str(errors[0]) == str(errors[1])
    assert "zero_stage is 0 on machine 0" in str(errors[0])


def test_machines_that_are_missing_are_named_on_every_machine(quick, capfd):
    done = [{"status": DONE}]
    first, second, _ = (Link(seat, {}, {}, list) for seat in seats(3))
    errors = together(lambda: one_run(first, done), lambda: one_run(second, done))
    assert [type(error) for error in errors] == [ConfigError] * 2
    assert "machine 2 did not come within 2 s." in str(errors[0])
    assert str(errors[0]) == str(errors[1])
    assert capfd.readouterr().err.count("machine 2 of 3 did not come to 127.0.0.1") == 2


def test_machine_0_that_does_not_answer_is_named_with_the_reason(quick, capfd):
    seat = seats(2)[1]
    (error,) = together(lambda: one_run(Link(seat, {}, {}, list), []))
    text = f"machine 0 does not answer at 127.0.0.1:{seat.port}: nothing listens there."
    assert text in str(error)
    assert text in capfd.readouterr().err
    nowhere = Seat(1, 2, "no-such-host.invalid", 29500, 0)
    (error,) = together(lambda: one_run(Link(nowhere, {}, {}, list), []))
    assert "the name no-such-host.invalid does not resolve" in str(error)


def test_ranks_are_ended_where_another_machine_has_failed(quick):
    here, there = seats(2)
    ended = threading.Event()
    first, second = Link(here, {}, {}, ended.set), Link(there, {}, {}, list)

    def waits() -> Any:
        try:
            first.open()
            first.start()
            assert ended.wait(10)
            first.report(FAILED, cause="ended", order=3)
            return first.settled()
        finally:
            first.close()

    state, _ = together(
        waits, lambda: one_run(second, [{"status": FAILED, "cause": "it broke", "order": 1, "code": 5}])
    )
    assert (state.phase, state.at, state.code) == (END, 1, 5)
    assert "it broke" in state.cause
