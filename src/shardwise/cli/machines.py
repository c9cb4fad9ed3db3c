"""How the launchers of several machines become one run: what each says, and what machine 0 concludes from it.

Torch's agents start ranks and watch them; they say little of a machine that does not come, and two that were told different
things wait for each other. So the launchers meet in the key-value store of the run before each start, and as long as it lasts:

    launcher m   arrival/n  = which machine it is and what it was told      once; n counts all that ever came
                 said/ID    = how far it is, with a count that moves        every second; a count that stands is a dead launcher
    machine 0    state      = who is missing | go | why the attempt ended   whenever it changes; every launcher reads it

    gather, attempt 0 -> run, attempt 0 -> (a machine failed) -> gather, attempt 1 -> run, attempt 1 -> end

Nobody is sent anything that could be lost: each writes what is so, and reads what the others wrote. A launcher that was killed
and is started again is another arrival of the same machine. This file is pure: `link.py` carries the words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self, cast

from ..config.agreement import differences, listed, of_any_version, ranks_said

CONNECT_WITHIN_S = 900.0
SAY_WHO_IS_MISSING_AFTER_S = 30.0
# A launcher is dead after this time without a word: while ranks fail somewhere, or while nothing else is wrong.
GONE_AFTER_FAILURE_S, GONE_AFTER_S = 10.0, 60.0
# How long a failure waits for the other machines' reports, one of which may be its cause.
SETTLE_WITHIN_S = 20.0

WAITING, RUNNING, DONE, FAILED, LEFT = "waiting", "running", "done", "failed", "left"
GATHER, RUN, END = "gather", "run", "end"
_FIRST = -1  # before the order of any failure that was reported


@dataclass(frozen=True)
class Arrival:
    """A launcher that came. name: tells it from one that was there before. facts: what all must have in common, by key.

    hints: what should be alike, but may differ on purpose. tried: attempts that it has behind it.
    """

    name: str
    machine: int
    host: str
    facts: Mapping[str, Any]
    hints: Mapping[str, Any] = field(default_factory=dict)
    tried: int = 0

    @property
    def words(self) -> str:
        return f"machine {self.machine} ({self.host})"

    @classmethod
    def read(cls, text: str) -> Arrival:
        """From what a launcher of any version wrote."""
        return cls(**{"host": "an unknown host", "facts": {}, **of_any_version(cls, json.loads(text))})


class _Word:
    """What is written into the store, as text, and read from there."""

    @classmethod
    def read(cls, text: str) -> Self:
        """From what a launcher of any version wrote."""
        return cls(**of_any_version(cls, json.loads(text)))

    def text(self) -> str:
        return json.dumps(asdict(cast(Any, self)))


@dataclass(frozen=True)
class Said(_Word):
    """How far a launcher is. order: of a failure, the smaller the likelier is it the cause. final: no restart after it."""

    status: str = WAITING
    attempt: int = 0
    cause: str = ""
    order: int = 0
    code: int = 1
    final: bool = False
    beat: int = 0


@dataclass(frozen=True)
class State(_Word):
    """What machine 0 concludes.

    members: the names of the launchers of this attempt, by machine. missing: machines that are not there.
    stop:    ranks are to end, for a machine has failed. cause: why the last attempt ended, with the machine.
    at:      the machine of the cause. problem: an error's text for all; nobody starts.
    refused: why one launcher may not join, by its name. code: the exit code at the end.
    """

    phase: str = GATHER
    attempt: int = 0
    members: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    stop: bool = False
    cause: str = ""
    at: int | None = None
    problem: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    code: int = 0


@dataclass
class _Seen:
    """A launcher as machine 0 sees it. changed_s: when it last said anything; came_s: when it was first seen."""

    arrival: Arrival
    came_s: float
    said: Said = Said()
    changed_s: float = 0.0


class Chair:
    """Machine 0's judgement. `look` is called again and again with all that is in the store; it gives the state to publish."""

    def __init__(self, machines: int, max_restarts: int) -> None:
        self._machines, self._max_restarts = machines, max_restarts
        self._seen: dict[str, _Seen] = {}
        self._state = State(missing=list(range(machines)))
        self._began_s: float | None = None
        self._failed_s: float | None = None
        self._gone: dict[int, str] = {}

    def look(self, now_s: float, arrivals: Sequence[Arrival], said: Mapping[str, Said]) -> State:
        """said: by the launcher's name; of those that have said nothing yet, nothing."""
        if self._began_s is None:
            self._began_s = now_s
        for arrival in arrivals:
            if arrival.name not in self._seen:
                self._seen[arrival.name] = _Seen(arrival, now_s, changed_s=now_s)
            seen, word = self._seen[arrival.name], said.get(arrival.name)
            if word is not None and word != seen.said:
                seen.said, seen.changed_s = word, now_s
        if self._state.phase == GATHER:
            self._state = self._gathered(now_s)
        elif self._state.phase == RUN:
            self._state = self._watched(now_s)
        return self._state

    def all_have_left(self) -> bool:
        """Whether every launcher has read the end, or is dead."""
        return all(seen.said.status == LEFT for seen in self._seen.values() if not self._is_dead(seen))

    def _is_dead(self, seen: _Seen, after_s: float = GONE_AFTER_FAILURE_S) -> bool:
        latest = max(other.changed_s for other in self._seen.values())
        return latest - seen.changed_s > after_s

    def _gathered(self, now_s: float) -> State:
        """The state while machines are missing, or what follows when all are there."""
        there: dict[int, _Seen] = {}
        for seen in self._seen.values():
            if seen.said.status == LEFT or self._is_dead(seen):
                continue
            machine = seen.arrival.machine
            other = there.get(machine)
            if other is not None and other.changed_s > seen.came_s:
                return self._ended(
                    f"machine_rank {machine} was given to two machines: {other.arrival.host} and {seen.arrival.host}. Each "
                    f"needs a number of its own, from 0 to {self._machines - 1}."
                )
            there[machine] = seen
        present = [there[machine] for machine in sorted(there)]
        problem = _disagreement([seen.arrival for seen in present])
        if problem:
            return self._ended(problem)
        missing = [machine for machine in range(self._machines) if machine not in there]
        attempt = max([self._state.attempt, *(seen.arrival.tried for seen in present)])
        state = State(
            attempt=attempt, missing=missing, cause=self._state.cause, at=self._state.at, refused=self._state.refused
        )
        if attempt > self._max_restarts:
            return self._ended(f"{attempt} attempts have failed, and max_restarts is {self._max_restarts}.")
        if missing and now_s - (self._began_s or 0.0) > CONNECT_WITHIN_S:
            return self._ended(self.late(missing))
        ready = all(seen.said.status == WAITING and seen.said.attempt == attempt for seen in present)
        # Of two launchers of one machine an earlier one may be dead already.
        clear = all(self._is_only(seen) for seen in present)
        if missing or not ready or not clear:
            return state
        self._failed_s, self._gone = None, {}
        differing = differences([seen.arrival.hints for seen in present])
        hints = [found.told(lambda rows: ranks_said(rows, "machine")) for found in differing]
        return State(RUN, attempt, [seen.arrival.name for seen in present], hints=hints)

    def _is_only(self, seen: _Seen) -> bool:
        others = [other for other in self._seen.values() if other.arrival.machine == seen.arrival.machine]
        return all(other is seen or other.said.status == LEFT or self._is_dead(other) for other in others)

    def late(self, missing: Sequence[int]) -> str:
        """The last word of a meeting to which not all came."""
        gone = "".join(f" {text}" for machine, text in self._gone.items() if machine in missing)
        return (
            f"{machines_said(missing)} did not come within {CONNECT_WITHIN_S:g} s.{gone} Start `shardwise launch` there with "
            f"its --machine_rank and this machine's main_process_ip and main_process_port."
        )

    def _ended(self, problem: str, code: int = 1) -> State:
        return State(END, self._state.attempt, problem=problem, refused=self._state.refused, code=code)

    def _watched(self, now_s: float) -> State:
        """The state while ranks run: who has failed, or is gone, and what follows."""
        state = self._state
        members = [self._seen[name] for name in state.members]
        refused = {**state.refused, **self._intruders(members)}
        of_now = [seen for seen in members if seen.said.attempt == state.attempt or seen.said.status == LEFT]
        failed = [seen for seen in of_now if seen.said.status in (FAILED, LEFT)]
        patience_s = GONE_AFTER_FAILURE_S if failed or self._replaced(members) else GONE_AFTER_S
        gone = [seen for seen in members if seen.said.status != LEFT and self._is_dead(seen, patience_s)]
        done = [seen for seen in of_now if seen.said.status == DONE]
        if not failed and not gone:
            if len(done) == len(members):
                return State(END, state.attempt, state.members, refused=refused)
            return State(RUN, state.attempt, state.members, refused=refused, hints=state.hints)
        if self._failed_s is None:
            self._failed_s = now_s
        heard = {seen.arrival.name for seen in (*failed, *gone, *done)}
        if len(heard) < len(members) and now_s - self._failed_s < SETTLE_WITHIN_S:
            return State(RUN, state.attempt, state.members, stop=True, refused=refused, hints=state.hints)
        return self._settled(now_s, failed, gone, refused)

    def _replaced(self, members: Sequence[_Seen]) -> bool:
        """Whether a launcher waits for the place of one that has perhaps died."""
        machines = {seen.arrival.machine: seen for seen in members}
        return any(
            seen.arrival.name not in self._state.refused
            and seen.arrival.machine in machines
            and seen is not machines[seen.arrival.machine]
            and seen.came_s > machines[seen.arrival.machine].came_s
            and not self._is_dead(seen)
            for seen in self._seen.values()
        )

    def _intruders(self, members: Sequence[_Seen]) -> dict[str, str]:
        """Launchers that came for a place whose launcher is alive, with the words for each."""
        found = {}
        for seen in self._seen.values():
            holder = next((one for one in members if one.arrival.machine == seen.arrival.machine), None)
            if seen in members or self._is_dead(seen):
                continue
            if holder is None:
                found[seen.arrival.name] = (
                    f"machine_rank {seen.arrival.machine} is none of this run's {self._machines} machines, which have begun."
                )
            elif holder.changed_s > seen.came_s:
                found[seen.arrival.name] = (
                    f"machine_rank {seen.arrival.machine} is taken by {holder.arrival.host}, whose ranks are running."
                )
        return found

    def _settled(self, now_s: float, failed: Sequence[_Seen], gone: Sequence[_Seen], refused: dict[str, str]) -> State:
        stopped = next((seen for seen in failed if seen.said.final), None)
        causes = [
            (_FIRST, seen.arrival.machine, f"{seen.arrival.words} is gone: nothing was heard of its launcher.", 1)
            for seen in gone
        ]
        _, at, cause, code = _cause(stopped) if stopped is not None else min([*causes, *map(_cause, failed)])
        self._gone = {seen.arrival.machine: f"{seen.arrival.words} is gone." for seen in gone}
        attempt = self._state.attempt
        if stopped is not None or attempt >= self._max_restarts:
            return State(END, attempt, self._state.members, cause=cause, at=at, refused=refused, code=code or 1)
        self._began_s = now_s
        return State(GATHER, attempt + 1, cause=cause, at=at, missing=sorted(self._gone))


def _cause(failed: _Seen) -> tuple[int, int, str, int]:
    """Of a launcher that failed, or has left: its order, its machine, the words for all, the exit code."""
    if failed.said.status == FAILED or failed.said.final:
        return (
            failed.said.order,
            failed.arrival.machine,
            f"{failed.arrival.words}: {failed.said.cause}",
            failed.said.code,
        )
    return _FIRST, failed.arrival.machine, f"{failed.arrival.words} has left.", 1


def machines_said(machines: Sequence[int]) -> str:
    """`machine 1`, `machines 1, 3`."""
    return f"machine{'s' if len(machines) > 1 else ''} {', '.join(map(str, machines))}"


def _disagreement(arrivals: Sequence[Arrival]) -> str:
    """One error for what differs between the machines that are there; empty for nothing."""
    found = differences([one.facts for one in arrivals])
    if not found:
        return ""
    told = listed(found, lambda rows: ", ".join(arrivals[row].words for row in rows))
    return f"the machines were told different things: {told}. Start all with the same script, settings and packages."
