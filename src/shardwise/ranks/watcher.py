"""The watcher: a thread of each rank that says who waits where, and what a failed collective says.

    every tick      its rank's line of the script into the record; a look at the records of all; one screen for each incident
    a collective    that has failed asks `explained`: the same records, and the same first line

It sends nothing to other ranks. It ends before the process groups do (`leaving.py`), and a forked child has none.
"""

from __future__ import annotations

import faulthandler
import linecache
import logging
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..config.machine import oom_kills
from .activity import End, activity
from .blame import Judgement, judge, named
from .board import Board, Seen
from .meeting import Place

log = logging.getLogger("shardwise")

_LONGEST_TICK_S = 1.0
_EXCHANGE_S = 10.0
# How long a failed collective looks for the reason: the kernel closes connections a moment before a process is gone.
_SETTLE_S = 1.5
_LIBRARIES = tuple(f"{Path(path)}{os.sep}" for path in (Path(__file__).parents[1], Path(os.__file__).parent))


def script_line(frame: FrameType, number: int) -> str:
    """`train.py:41 (time.sleep(60))`; "" for a line of a library."""
    path = frame.f_code.co_filename
    if path.startswith(("<frozen", *_LIBRARIES)) or "site-packages" in path:
        return ""
    text = " ".join(linecache.getline(path, number).split())
    return f"{os.path.basename(path)}:{number}" + (f" ({text[:80]})" if text else "")


def _innermost_line(frame: FrameType | None) -> str:
    while frame is not None:
        line = script_line(frame, frame.f_lineno)
        if line:
            return line
        frame = frame.f_back
    return ""


class Watcher:
    """Watches one board.

    warning_s: how long a wait may take before it is told of.
    """

    def __init__(self, board: Board, warning_s: float) -> None:
        self.board = board
        self.warning_s = warning_s
        self._told: frozenset[tuple[int, int]] = frozenset()  # the incident that was told of: see `_trouble`
        self._wanted: dict[int, int] = {}  # screens that were asked for, by rank
        self._exchanged = 0.0
        self._kills_before = oom_kills()
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._wake, self._waker = os.pipe()
        for end in (self._wake, self._waker):
            os.set_blocking(end, False)
        self._hears = self._listen()
        self._thread = threading.Thread(target=self._run, name="shardwise-watcher", daemon=True)
        self._thread.start()

    def _listen(self) -> bool:
        """Hear SIGUSR2 by faulthandler's handler, which needs no interpreter; not where the script has one of its own."""
        handler = signal.getsignal(signal.SIGUSR2)
        if handler not in (signal.SIG_DFL, signal.SIG_IGN) and getattr(handler, "__name__", "") != "wait_to_be_heard":
            return False
        faulthandler.register(signal.SIGUSR2, file=self._waker, all_threads=False)
        return True

    def stop(self) -> None:
        """End the thread. It may be in the store, and then ends by itself."""
        self._over.set()
        with suppress(OSError):
            os.write(self._waker, b".")
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)
        if self._hears:
            faulthandler.unregister(signal.SIGUSR2)
        if not self._thread.is_alive():
            for end in (self._wake, self._waker):
                os.close(end)

    @property
    def _tick_s(self) -> float:
        return min(_LONGEST_TICK_S, self.warning_s / 4)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._over.is_set():
            if poll.poll(1000 * self._tick_s):
                with suppress(BlockingIOError):
                    while os.read(self._wake, 4096):
                        if not self._over.is_set():
                            activity.wants_screen()
            if self._over.is_set():
                return
            try:
                self._tick()
            except Exception as error:  # what only watches must not end a run
                log.debug("the watcher of waits failed: %r", error)

    def _tick(self) -> None:
        activity.beats(_innermost_line(sys._current_frames().get(self._main or 0)))
        self.board.look_around()
        now = time.monotonic()
        leads = self.board.leads
        if leads and self.board.several_places and now - self._exchanged > min(_EXCHANGE_S, self.warning_s / 2):
            self._exchanged = now
            self.board.exchange(listen=self.board.rank == 0 or not self._rank_0_is_here())
        if leads and (self.board.rank == 0 or self._rank_0_is_here() or self._rank_0_is_silent()):
            self._look(self.board.seen(), now)

    def _rank_0_is_here(self) -> bool:
        return self.board.sees(0)

    def _rank_0_is_silent(self) -> bool:
        record = self.board.seen()[0].record
        return record is not None and time.monotonic() - record.beat > 3 * _EXCHANGE_S + self.warning_s

    def _look(self, seen: Sequence[Seen], now: float) -> None:
        """Tell of an incident, once."""
        wanted = {one.rank: one.record.wanted for one in seen if one.record is not None}
        if any(count > self._wanted.get(rank, 0) for rank, count in wanted.items()):
            self._wanted = wanted
            self.tell(judge(seen, now, memory_kills=self.kills()), "asked for by SIGUSR2")
        trouble = self._trouble(seen, now)
        lost = {rank for rank, begun in trouble if begun < 0} - {rank for rank, begun in self._told if begun < 0}
        goes_on = bool(trouble & self._told)
        if trouble and (lost or not goes_on):
            self.tell(judge(seen, now, memory_kills=self.kills()), "")
        self._told = trouble | (self._told if goes_on else frozenset())

    def _trouble(self, seen: Sequence[Seen], now: float) -> frozenset[tuple[int, int]]:
        """What is to be told of: (rank, its collective's number) for a wait that lasts too long, (rank, -1) for one that ended.

        One that has ended because of a wait, and said so, is nothing new.
        """
        known = [(one, one.record) for one in seen if one.record is not None]
        waits = [record for one, record in known if record.waits_in and not one.ended]
        alive = [one for one in seen if not (one.ended or one.left)]
        if len(waits) == len(alive) and any(now - record.waits_since < self._tick_s for record in waits):
            return self._told  # the last one has just come: they go on, or the next look finds where they are
        found = {(record.rank, record.begun) for record in waits if now - record.waits_since >= self.warning_s}
        if waits:
            found |= {
                (one.rank, -1) for one in seen if one.ended and not (one.record is not None and one.record.last_word)
            }
        if not waits and _on_devices and known:
            begun = {record.begun for one, record in known if not one.left}
            if now - max(record.moved for _, record in known) >= self.warning_s and len(begun) > 1:
                found |= {(record.rank, record.begun) for _, record in known}
        return frozenset(found)

    def kills(self) -> int:
        """How many processes the kernel has killed for memory since this one watches."""
        now = oom_kills()
        return 0 if now is None or self._kills_before is None else max(0, now - self._kills_before)

    def tell(self, found: Judgement, why: str) -> None:
        log.warning("%s%s", f"({why}) " if why else "", found.screen)


_on_devices = False
_board: Board | None = None
_of_world: weakref.ref[Any] | None = None
_watcher: Watcher | None = None


def join_board(rank: int, world: Any, store: Any, *, devices: bool) -> None:
    """Publish what this process does from now on, as a rank of `world`, torch's group of all; nothing where it does already.

    store: the one by which the ranks met. devices: collectives are only enqueued by the host.
    """
    global _board, _of_world, _on_devices  # noqa: PLW0603 - there is one run in a process
    if _board is not None and _of_world is not None and _of_world() is world:
        return
    leave_board()
    _on_devices, _of_world = devices, weakref.ref(world)
    _board = Board(rank, world.size(), store)
    _board.announce()


def place_board(places: Sequence[Place]) -> None:
    """This is where every rank sits; every one has joined its board."""
    if _board is not None:
        _board.placed(places)


def explained(error: BaseException) -> str:
    """The line that names the rank that a failed collective waited for; "" if none can be named. error: torch's."""
    if _board is None:
        return ""
    at_once = "timed out" not in str(error).lower()
    deadline = time.monotonic() + (_SETTLE_S if at_once else 0.0)
    while True:
        seen = _board.seen()
        said = [
            (one.record.verdict_at, one.record.last_word)
            for one in seen
            if one.record is not None and one.record.last_word
        ]
        if said:
            return min(said)[1]
        if any(one.ended or one.left for one in seen) or time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    kills = _watcher.kills() if _watcher is not None else 0
    line = named(judge(seen, time.monotonic(), memory_kills=kills).line)
    if line:
        activity.judged(line)
    return line


def missing_batches(iteration: int, batches: int, *, ended: bool) -> tuple[int, int] | None:
    """A neighbour whose loader has come to another end than this rank's, and how many batches it has given; None for none."""
    if _board is None:
        return None
    for rank, theirs, given, over in _board.neighbours_batches():
        if theirs == iteration and ((over and given < batches) or (ended and given > batches)):
            return rank, given
    return None


def watch(warning_s: float) -> None:
    """Have the watcher of this process tell of waits longer than that; 0 ends it."""
    global _watcher  # noqa: PLW0603
    if _board is None:
        return
    if _watcher is not None and (warning_s == 0 or _watcher.board is not _board):
        _watcher.stop()
        _watcher = None
    if warning_s == 0:
        return
    if _watcher is None:
        _watcher = Watcher(_board, warning_s)
    _watcher.warning_s = warning_s


def stop_watching() -> None:
    """Before the process groups go: the thread ends, and what was seen can still be read."""
    global _watcher  # noqa: PLW0603
    if _watcher is not None:
        _watcher.stop()
        _watcher = None


def script_ended(code: int, words: str = "", trace: TracebackType | None = None) -> None:
    """The script is over, and the interpreter ends with that code: it is said before the others find this rank gone.

    words: of its error. trace: of SystemExit without a code. For whoever runs the script.
    """
    where = ""
    while trace is not None:
        where = script_line(trace.tb_frame, trace.tb_lineno) or where
        trace = trace.tb_next
    activity.ended(End.FAILED if code else End.ENDED, code, words.split("\n", 1)[0] if code else where)


def interpreter_ends() -> None:
    """Nothing of the script runs any more, and it has not left the run."""
    global _board  # noqa: PLW0603
    error: BaseException | None = getattr(sys, "last_value", None)
    if error is None:
        activity.ended(End.ENDED, -1)
    else:
        activity.ended(End.FAILED, 1, f"{type(error).__name__}: {error}".split("\n", 1)[0])
    stop_watching()
    _board = None  # it holds the store, which is to end before the interpreter does


def leave_board() -> None:
    """The run is left: this process publishes nothing any more."""
    global _board  # noqa: PLW0603
    stop_watching()
    if _board is not None:
        activity.ended(End.LEFT)
        activity.close()
        _board.close()
        _board = None


def _forget_in_child() -> None:
    global _board, _watcher  # noqa: PLW0603
    _board = _watcher = None


os.register_at_fork(after_in_child=_forget_in_child)
