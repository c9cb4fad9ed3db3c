"""One launcher's line to those of the other machines: it carries what `machines.py` says through the run's key-value store.

Machine 0's launcher holds the store, at main_process_ip and main_process_port, for as long as the run lasts; torch's agents and
the ranks use the same one under names of their own. A thread writes how far this launcher is, and reads what machine 0
concludes; on machine 0 it is the one that concludes.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config.launchers import LOOPBACK
from ..errors import ConfigError, LaunchError
from . import machines as meeting
from .machines import END, GATHER, LEFT, RUN, RUNNING, WAITING, Arrival, Chair, Said, State, machines_said
from .place import is_of_this_machine

TICK_S = 0.5
# Ranks that miss a peer end by themselves, with words of their own; those that do not are ended after this time.
LET_RANKS_END_S = 5.0
_ANSWER_WITHIN_S = 5.0
_READ_THE_END_S = 6.0


def say(text: str) -> None:
    print(f"shardwise launch: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Seat:
    """Which machine this is, of how many, and where machine 0 is found. max_restarts: as in the settings."""

    machine: int
    machines: int
    address: str
    port: int
    max_restarts: int

    @property
    def where(self) -> str:
        return f"{self.address}:{self.port}"


class Link:
    """The line. end_ranks: called, in a thread, when this machine's ranks are to end because another machine has failed.

    facts, hints: as in `Arrival`. Its methods raise ConfigError where the machines cannot be one run, LaunchError where one
    does not come.
    """

    def __init__(
        self, seat: Seat, facts: Mapping[str, Any], hints: Mapping[str, Any], end_ranks: Callable[[], None]
    ) -> None:
        self._seat, self._end_ranks = seat, end_ranks
        self._arrival = Arrival(uuid.uuid4().hex, seat.machine, socket.gethostname(), facts, hints)
        self._said = Said()  # written by the launcher alone; the thread's count is its own
        self._beat = 0
        self._state: State | None = None
        self._lost: str | None = None
        self._news = threading.Condition()
        self._store: Any = None
        self._own: Any = None  # machine 0's: it holds the store for all
        self._chair: Chair | None = None
        self._published = ""
        self._thread: threading.Thread | None = None
        self._halted = threading.Event()
        self._unwanted_since: float | None = None

    @property
    def state(self) -> State | None:
        """What machine 0 has concluded; None if it is not there."""
        return self._state if self._lost is None else None

    def open(self) -> None:
        """Find machine 0, or be it, and come to its meeting."""
        self._halt()
        self._lost, self._state, self._published, self._chair = None, None, "", None
        self._arrival = replace(self._arrival, name=uuid.uuid4().hex)
        if self._seat.machine == 0:
            if self._own is None:
                self._own = self._hold()
            self._store, self._chair = self._own, Chair(self._seat.machines, self._seat.max_restarts)
        else:
            self._store = self._connect()
        self._arrive()
        self._halted = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._halted,), name="shardwise-machines", daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        """End the thread, which may wait for a store that is gone; it then touches nothing any more."""
        self._halted.set()
        if self._thread is not None:
            self._thread.join(_ANSWER_WITHIN_S)

    def _hold(self) -> Any:
        from ..ranks.joining import launchers_store

        # torch connects to the address: where it is another machine's, that would be the other one's store.
        mine = is_of_this_machine(self._seat.address)
        try:
            address = self._seat.address if mine else LOOPBACK
            return launchers_store(address, self._seat.port, holds=True, timeout_s=_ANSWER_WITHIN_S)
        except RuntimeError as error:
            raise LaunchError(f"machine 0 cannot listen at {self._seat.where}: {_short(error)}") from None

    def _connect(self) -> Any:
        """A connection to machine 0's store. Says once that it waits, and why."""
        from ..ranks.joining import launchers_store

        say(f"machine {self._seat.machine} waits for machine 0 at {self._seat.where}")
        began, told = time.monotonic(), False
        while True:
            why = _no_answer(self._seat.address, self._seat.port)
            if why is None:
                try:
                    return launchers_store(self._seat.address, self._seat.port, holds=False, timeout_s=_ANSWER_WITHIN_S)
                except RuntimeError:
                    why = "what answers there is no launcher"
            passed = time.monotonic() - began
            text = (
                f"machine 0 does not answer at {self._seat.where}: {why}. Is its launcher running, and are main_process_ip and "
                "main_process_port the same on every machine?"
            )
            if passed > meeting.CONNECT_WITHIN_S:
                raise LaunchError(f"{text} It was tried for {passed:.0f} s.")
            if passed > meeting.SAY_WHO_IS_MISSING_AFTER_S and not told:
                say(f"{text} It is tried for {meeting.CONNECT_WITHIN_S:g} s.")
                told = True
            time.sleep(0.3)

    def _arrive(self) -> None:
        place = self._store.add("arrivals", 1)
        self._store.set(f"arrival/{place}", json.dumps(asdict(self._arrival)))
        self._store.set(f"arrival/{self._arrival.name}", str(place))

    # What the thread does.

    def _run(self, halted: threading.Event) -> None:
        while not halted.is_set():
            try:
                if self._lost is None:
                    self._tick(halted)
            except Exception as error:  # torch's, of a store that has ended
                if halted.is_set():
                    return
                with self._news:
                    self._lost = _short(error)
                    self._news.notify_all()
            self._end_unwanted_ranks()
            halted.wait(TICK_S)

    def _tick(self, halted: threading.Event) -> None:
        if self._chair is not None:
            self._look_for_another_chair()
        self._beat += 1
        store = self._store
        store.set(f"said/{self._arrival.name}", replace(self._said, beat=self._beat).text())
        if self._chair is not None:
            self._conclude(store, self._chair)
        if store.check(["state"]):
            state = State.read(store.get("state").decode())
            with self._news:
                if not halted.is_set():
                    self._state = state
                    self._news.notify_all()

    def _conclude(self, store: Any, chair: Chair) -> None:
        arrivals = []
        for place in range(1, store.add("arrivals", 0) + 1):
            if store.check([f"arrival/{place}"]):
                arrivals.append(Arrival.read(store.get(f"arrival/{place}").decode()))
        said = {
            one.name: Said.read(store.get(f"said/{one.name}").decode())
            for one in arrivals
            if store.check([f"said/{one.name}"])
        }
        text = chair.look(time.monotonic(), arrivals, said).text()
        if text != self._published:
            store.set("state", text)
            self._published = text

    def _look_for_another_chair(self) -> None:
        """Where machine 0's address is another machine's, and a launcher is there: come to its meeting, which tells all."""
        waiting = self._state is None or self._state.phase == GATHER
        if not waiting or is_of_this_machine(self._seat.address):
            return
        if _no_answer(self._seat.address, self._seat.port) is not None:
            return
        from ..ranks.joining import launchers_store

        try:
            other = launchers_store(self._seat.address, self._seat.port, holds=False, timeout_s=_ANSWER_WITHIN_S)
        except RuntimeError:
            return
        if other.check([f"arrival/{self._arrival.name}"]):  # an address of this machine that another one translates
            return
        self._store, self._chair = other, None
        self._arrive()

    def _end_unwanted_ranks(self) -> None:
        """End this machine's ranks, a while after another machine has failed."""
        state = self._state
        going = state is not None and state.phase == RUN and not state.stop and state.attempt == self._said.attempt
        if self._said.status != RUNNING or (going and self._lost is None):
            self._unwanted_since = None
            return
        if self._unwanted_since is None:
            self._unwanted_since = time.monotonic()
        elif time.monotonic() - self._unwanted_since > LET_RANKS_END_S:
            self._end_ranks()

    # What the launcher asks.

    def start(self) -> int:
        """Wait until all machines are there; the attempt that begins. Says who is missing, once for each change."""
        began, told = time.monotonic(), ""
        while True:
            with self._news:
                self._news.wait(0.2)
                state, lost = self._state, self._lost
            if lost is not None:
                raise LaunchError(f"machine 0 at {self._seat.where} is gone: {lost}")
            name, passed = self._arrival.name, time.monotonic() - began
            if state is None:
                if passed > meeting.CONNECT_WITHIN_S:
                    raise LaunchError(f"at {self._seat.where} a store of torch answers, but no launcher of machine 0.")
                continue
            if name in state.refused:
                raise ConfigError(state.refused[name])
            if state.phase == END:
                raise ConfigError(state.problem or state.cause or "the run has ended.")
            if state.phase == RUN and name in state.members:
                for hint in state.hints:
                    say(f"note: {hint}.")
                self._said = replace(self._said, status=RUNNING, attempt=state.attempt)
                return state.attempt
            if state.attempt > self._said.attempt:
                self._said = replace(self._said, attempt=state.attempt)
            if state.missing and passed > meeting.SAY_WHO_IS_MISSING_AFTER_S:
                told = self._say_missing(state, passed, told)

    def _say_missing(self, state: State, passed: float, told: str) -> str:
        who = machines_said(state.missing)
        if who != told:
            say(
                f"{who} of {self._seat.machines} did not come to {self._seat.where} within {passed:.0f} s; "
                f"this one waits up to {meeting.CONNECT_WITHIN_S:g} s."
            )
        return who

    def report(self, status: str, *, cause: str = "", order: int = 0, code: int = 1, final: bool = False) -> None:
        """Tell machine 0 how this machine's attempt has ended."""
        self._said = replace(self._said, status=status, cause=cause, order=order, code=code, final=final)

    def settled(self) -> State | None:
        """What follows for all, once every machine has reported; None if machine 0 is gone."""
        attempt, quiet_s = self._said.attempt, time.monotonic()
        state: State | None = None
        while True:
            with self._news:
                heard = self._news.wait(0.2)
                if self._lost is not None:
                    return None
                state = self._state
            quiet_s = time.monotonic() if heard else quiet_s
            if time.monotonic() - quiet_s > meeting.GONE_AFTER_FAILURE_S:  # its machine may have lost its power
                return None
            if state is not None and (state.phase == END or state.attempt > attempt):
                if state.attempt > attempt:
                    self._said = replace(self._said, status=WAITING, attempt=state.attempt, cause="", order=0)
                return state

    def reopen(self, tried: int) -> None:
        """After machine 0 was lost: wait for its launcher to be started again, and come to its meeting."""
        self._arrival = replace(self._arrival, tried=tried)
        self._said = Said(attempt=tried)
        self.open()

    def close(self) -> None:
        """Leave. Machine 0 stays until the others have read the end, or for a few seconds."""
        if self._thread is None:
            return
        self._said = replace(self._said, status=LEFT)
        until = time.monotonic() + _READ_THE_END_S
        while self._chair is not None and self._lost is None and time.monotonic() < until:
            time.sleep(TICK_S)
            if self._chair.all_have_left():
                break
        self._halt()
        if self._chair is None and self._lost is None:
            with suppress(Exception):  # torch's, of a store that has just ended
                self._store.set(f"said/{self._arrival.name}", self._said.text())
        self._thread = None


def _no_answer(address: str, port: int) -> str | None:
    """Why nothing can be connected to there; None if something can."""
    try:
        with socket.create_connection((address, port), timeout=_ANSWER_WITHIN_S):
            return None
    except socket.gaierror as error:
        return f"the name {address} does not resolve ({error.strerror})"
    except TimeoutError:
        return "there is no such machine, or a firewall between"
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            return "nothing listens there"
        return str(error.strerror or error)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
