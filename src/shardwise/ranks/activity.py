"""What this process does, published where the other ranks of its machine can read it: a record of fixed size in shared memory.

    activity.waits("all_gather") ... activity.goes_on()     around a collective
    activity.unit("layers.3")                               a unit is needed
    with activity.call("save_state"): ...                   a verb of the script

Each of them packs a few numbers and a name into the record: about a microsecond, no lock, nothing sent. The training path
writes it, one thread at a time; the watcher writes its own part. Who reads is told in `board.py`, what is said of it in
`blame.py`; see docs/design/waits.md. There is one record in a process, because there is one main thread.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import ParamSpec, TypeVar

from ..config.machine import process_fields
from .listener import Listener

P = ParamSpec("P")
R = TypeVar("R")

SIZE = 4096
BARRIER = "wait_for_everyone"  # how the ranks' barrier is told of
_MAGIC = b"shardw1\n"


class Doing(IntEnum):
    """What a model is in."""

    NONE = 0
    FORWARD = 1
    EVALUATION = 2
    BACKWARD = 3
    STEP = 4


class End(IntEnum):
    """How a process has left the run."""

    NOT = 0
    LEFT = 1  # in order, or to join another run
    ENDED = 2  # its interpreter ends, and it has not left
    FAILED = 3  # the same, with an error


# Each part begins where no other is written. Times are those of the monotonic clock, which processes of a machine share.
_IDENTITY, _IDENTITY_AT = struct.Struct("<8sIIQ16s"), 0  # magic, rank, process, its start in ticks, number of the run
_PLACE, _PLACE_AT = struct.Struct("<dB80s"), 64  # when, pass, unit
_WAIT, _WAIT_AT = struct.Struct("<dQ40s"), 192  # since, collectives begun, the one that runs
_CALL, _CALL_AT = struct.Struct("<d40s"), 320  # since, verb
_COUNT, _COUNT_AT = (
    struct.Struct("<dIIIIBB"),
    448,
)  # when, steps, forwards, iteration, batches, epoch ended, asks for one
_BEAT, _BEAT_AT = struct.Struct("<dId500s"), 512  # when, screens that were asked for, when the line was seen, line
_END, _END_AT = struct.Struct("<dBi300s"), 1536  # when, how, exit code, words
_VERDICT, _VERDICT_AT = struct.Struct("<dQ1800s"), 2048  # when, collectives begun then, first line


@dataclass(frozen=True)
class Record:
    """What a process has published. Times in seconds on its machine's monotonic clock; 0.0 for never.

    moved:     when it last published anything. begun: how many collectives it has begun.
    waits_in:  the collective that it is in, since `waits_since`; "" for none. calls: the same for a verb of the script.
    steps:     optimizer steps done. batches: that the loader has given in this iteration. forwards: of training, since then.
    iteration: which loader it is in, and how often that one was begun, as one number. epoch_ended: it has no more batches.
    asks:      it is asked for one now.
    beat:      when the watcher last wrote; 0.0 without one. line: of the script.
    verdict:   what it has said of a wait that failed, after it had begun `judged` collectives.
    """

    rank: int
    pid: int
    started: int
    run: str
    moved: float = 0.0
    doing: Doing = Doing.NONE
    unit: str = ""
    waits_in: str = ""
    waits_since: float = 0.0
    begun: int = 0
    calls: str = ""
    calls_since: float = 0.0
    steps: int = 0
    forwards: int = 0
    iteration: int = 0
    batches: int = 0
    epoch_ended: bool = False
    asks: bool = False
    asks_since: float = 0.0
    beat: float = 0.0
    wanted: int = 0
    line: str = ""
    end: End = End.NOT
    end_code: int = 0
    end_words: str = ""
    verdict: str = ""
    verdict_at: float = 0.0
    judged: int = 0

    @property
    def last_word(self) -> str:
        """`verdict`, unless it has begun another collective since: then it was of something that is over."""
        return self.verdict if self.begun <= self.judged else ""


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def read(buffer: memoryview | mmap.mmap) -> Record | None:
    """What lies in `buffer`; None if that is no record."""
    before = bytes(buffer[:SIZE])
    for _ in range(5):  # until no write has come between
        again = bytes(buffer[:SIZE])
        if again == before:
            break
        before = again
    magic, rank, pid, started, run = _IDENTITY.unpack_from(before, _IDENTITY_AT)
    if magic != _MAGIC:
        return None
    placed, doing, unit = _PLACE.unpack_from(before, _PLACE_AT)
    waited, begun, waits_in = _WAIT.unpack_from(before, _WAIT_AT)
    called, calls = _CALL.unpack_from(before, _CALL_AT)
    counted, steps, forwards, iteration, batches, epoch_ended, asks = _COUNT.unpack_from(before, _COUNT_AT)
    beat, wanted, _, line = _BEAT.unpack_from(before, _BEAT_AT)
    _, end, code, words = _END.unpack_from(before, _END_AT)
    verdict_at, judged, verdict = _VERDICT.unpack_from(before, _VERDICT_AT)
    return Record(
        rank=rank,
        pid=pid,
        started=started,
        run=_text(run),
        moved=max(placed, waited, called, counted),
        doing=Doing(doing),
        unit=_text(unit),
        waits_in=_text(waits_in),
        waits_since=waited,
        begun=begun,
        calls=_text(calls),
        calls_since=called,
        steps=steps,
        forwards=forwards,
        iteration=iteration,
        batches=batches,
        epoch_ended=bool(epoch_ended),
        asks=bool(asks),
        asks_since=counted,
        beat=beat,
        wanted=wanted,
        line=_text(line),
        end=End(end),
        end_code=code,
        end_words=_text(words),
        verdict=_text(verdict),
        verdict_at=verdict_at,
        judged=judged,
    )


def counts_of(buffer: memoryview | mmap.mmap) -> tuple[int, int, bool]:
    """Of a record, what loaders compare: iteration, batches, whether its epoch has ended. Quicker than all of it."""
    _, _, _, iteration, batches, ended, _ = _COUNT.unpack_from(buffer, _COUNT_AT)
    return iteration, batches, bool(ended)


def start_of(pid: int) -> int:
    """When a process began, in the kernel's ticks: with its number it is one process for good. 0 where nothing tells."""
    fields = process_fields(pid)
    return 0 if fields is None else int(fields[19])


class Activity:
    """The record of this process. shared: whether it lies where others can read it; without it nothing is published.

    listener: who is told what happens, besides; one, or None.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self._buffer: mmap.mmap | bytearray = bytearray(SIZE)
        self._names: dict[str, bytes] = {}
        self._forget_all()
        self.shared = False
        self.descriptor = -1

    def _forget_all(self) -> None:
        self._pass = 0
        self._unit = b""
        self._begun = self._steps = self._forwards = self._batches = 0
        self._iterations: dict[int, int] = {}
        self._iteration, self._ended, self._asks = 0, 0, 0
        self._wanted = self._before = self._judged = 0
        self._depth = 0
        self._calls: list[bytes] = []

    def share(self, rank: int, run: str) -> None:
        """Publish from now on, as `rank` of the run of that number; for this process alone where there is no such memory."""
        self.close()
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("shardwise-activity", os.MFD_CLOEXEC)
            os.truncate(self.descriptor, SIZE)
            self._buffer = mmap.mmap(self.descriptor, SIZE)
        else:
            self._buffer = mmap.mmap(-1, SIZE)
        self.shared = True
        pid = os.getpid()
        _IDENTITY.pack_into(self._buffer, _IDENTITY_AT, _MAGIC, rank, pid, start_of(pid), run.encode()[:16])

    def close(self) -> None:
        """Publish nothing any more, and tell nobody. Who has mapped the record keeps it as it was."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self._buffer, self.descriptor, self.shared = bytearray(SIZE), -1, False
        self.listener = None
        self._forget_all()

    def record(self) -> Record | None:
        return read(memoryview(self._buffer))

    def _name(self, name: str) -> bytes:
        """As bytes; of a long one the end, which tells units apart."""
        found = self._names.get(name)
        if found is None:
            raw = name.encode(errors="replace")
            found = self._names[name] = raw if len(raw) <= 80 else b"..." + raw[-77:]
        return found

    # The training path.

    def waits(self, collective: str) -> bool:
        """A collective begins. Whether it is none inside of another: then `goes_on` is to follow."""
        if not self.shared or self._depth:
            return False
        self._depth = 1
        self._begun += 1
        _WAIT.pack_into(self._buffer, _WAIT_AT, time.monotonic(), self._begun, self._name(collective))
        return True

    def goes_on(self) -> None:
        self._depth = 0
        _WAIT.pack_into(self._buffer, _WAIT_AT, time.monotonic(), self._begun, b"")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, this rank waits for others in another way than by a collective of torch."""
        outermost = self.waits(what)
        try:
            yield
        finally:
            if outermost:
                self.goes_on()

    def begins(self, doing: Doing, *, counts: bool = False) -> None:
        """A pass begins, or with NONE ends. counts: it is a training forward, and no part of one that was interrupted."""
        if self.shared:
            if counts:
                self._forwards += 1
                self._count()
            self._pass, self._unit = int(doing), b""
            _PLACE.pack_into(self._buffer, _PLACE_AT, time.monotonic(), self._pass, b"")
        if self.listener is not None:
            self.listener.begins(doing)

    def evaluates(self) -> None:
        """Forwards without gradients follow that are too small to be told one by one, as of tokens."""
        if self.listener is not None:
            self.listener.begins(Doing.EVALUATION)

    def unit(self, name: str) -> None:
        """The computation needs this unit, or its gradients are reduced."""
        if self.shared:
            unit = self._name(name)
            if unit is not self._unit:
                self._unit = unit
                _PLACE.pack_into(self._buffer, _PLACE_AT, time.monotonic(), self._pass, unit)

    @contextmanager
    def call(self, verb: str) -> Iterator[None]:
        """Inside, the script is in that verb. Of verbs inside of each other the outermost is published."""
        listener = self.listener
        if listener is not None:
            listener.calls(verb)
        try:
            with self._published(verb):
                yield
        finally:
            if listener is not None:
                listener.returns()

    @contextmanager
    def _published(self, verb: str) -> Iterator[None]:
        if not self.shared:
            yield
            return
        self._calls.append(self._name(verb))
        if len(self._calls) == 1:
            _CALL.pack_into(self._buffer, _CALL_AT, time.monotonic(), self._calls[0])
        try:
            yield
        finally:
            if self._calls:  # the run may have been left inside
                self._calls.pop()
            if not self._calls and self.shared:
                _CALL.pack_into(self._buffer, _CALL_AT, time.monotonic(), b"")

    def _count(self) -> None:
        counts = (self._steps, self._forwards - self._before, self._iteration, self._batches, self._ended, self._asks)
        _COUNT.pack_into(self._buffer, _COUNT_AT, time.monotonic(), *counts)

    def stepped(self, steps: int) -> None:
        """An optimizer step is done, and they are so many."""
        if self.shared:
            self._steps = steps
            self._count()
            self.begins(Doing.NONE)
        if self.listener is not None:
            self.listener.stepped()

    def begins_iteration(self, loader: int) -> tuple[int, int]:
        """A prepared loader is iterated over: a number for that iteration, and how many forwards there were before.

        loader: its number in the process. Ranks that are in the same iteration of the same loader have the same number,
        whatever one of them has read alone: it is that of the loader, and how often that one was begun.
        """
        count = self._iterations[loader] = self._iterations.get(loader, 0) + 1
        return loader % 2**16 << 16 | count % 2**16, self._forwards

    def loads(self, iteration: int, batches: int, before: int, *, ended: bool = False) -> None:
        """A loader gives the last of so many batches of that iteration. before: see above. ended: it has no more."""
        if self.shared:
            self._before = before
            self._iteration, self._batches, self._ended, self._asks = iteration, batches, int(ended), 0
            self._count()

    def asks(self, *, over: bool = False) -> None:
        """A loader is asked for a batch that it has not yet; over: it has it."""
        if self.shared:
            self._asks = int(not over)
            self._count()

    # Others.

    def beats(self, line: str) -> None:
        """The watcher's: this process lives, and its main thread is in `line` of the script."""
        now = time.monotonic()
        _BEAT.pack_into(self._buffer, _BEAT_AT, now, self._wanted, now, line.encode(errors="replace")[:500])

    def wants_screen(self) -> None:
        """Somebody has asked this process who waits where."""
        self._wanted += 1

    def ended(self, how: End, code: int = 0, words: str = "") -> None:
        """The process leaves the run, or ends. What was said first holds."""
        if self.shared and self._buffer[_END_AT + 8] == End.NOT:
            raw = words.encode(errors="replace")[:300]
            _END.pack_into(self._buffer, _END_AT, time.monotonic(), int(how), code, raw)

    def judged(self, line: str) -> None:
        """This rank is about to raise because of a wait, with these words: others that find it gone know why.

        What was said first of one wait holds.
        """
        if self.shared and self._begun > self._judged:
            self._judged = self._begun
            raw = line.encode(errors="replace")[:1800]
            _VERDICT.pack_into(self._buffer, _VERDICT_AT, time.monotonic(), self._judged, raw)


activity = Activity()


def published(verb: Callable[P, R]) -> Callable[P, R]:
    """`verb`, of which others are told while it runs: one for which the ranks meet."""
    name = verb.__name__

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with activity.call(name):
            return verb(*args, **kwargs)

    return call


def _forget_in_child() -> None:
    """A forked child is no rank: it publishes nothing into its parent's record."""
    activity.close()


os.register_at_fork(after_in_child=_forget_in_child)
