"""Where the time goes: every moment belongs to one part, and a part ends where the next begins.

    host    data |forward_backward      |step|other|data |...        marks: readings of the host's clock
    device       data |  forward_backward      |step|other|data|...  marks: events on the stream that computes

So the parts of an interval sum to it. On a GPU the host only records events, and reads the time between two of them when both
have passed: nothing waits for the device. This file knows neither steps nor what the parts are.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch

from ..ranks.lanes import compute_stream, timed_mark


class Mark(Protocol):
    """A moment. `passed` says whether it has come; `until` waits for the later one, and gives the seconds between."""

    def passed(self) -> bool: ...

    def until(self, later: Mark) -> float: ...


class HostMark:
    """A moment on the host's clock."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def passed(self) -> bool:
        return True

    def until(self, later: Mark) -> float:
        assert isinstance(later, HostMark)
        return later.at - self.at


class DeviceMark:
    """A moment on a stream of a GPU: when it has done what it was given before."""

    __slots__ = ("_event",)

    def __init__(self, stream: torch.Stream) -> None:
        self._event = timed_mark(stream)

    def passed(self) -> bool:
        return bool(self._event.query())

    def until(self, later: Mark) -> float:
        assert isinstance(later, DeviceMark)
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000


class Interval:
    """Spans of time by part, one after the other, until it is cut. seconds: of those that were read so far."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._unread: deque[tuple[str, Mark, Mark]] = deque()

    def add(self, part: str, begin: Mark, end: Mark) -> None:
        """Add a span. What has passed is read, so that a long interval keeps few marks."""
        self._unread.append((part, begin, end))
        while len(self._unread) > 32 and self._unread[0][2].passed():
            self._read_one()

    def passed(self) -> bool:
        """Whether all of it can be read without waiting."""
        return not self._unread or self._unread[-1][2].passed()

    def read(self) -> dict[str, float]:
        """Seconds by part. Waits for the device where its end has not passed."""
        while self._unread:
            self._read_one()
        return self.seconds

    def _read_one(self) -> None:
        part, begin, end = self._unread.popleft()
        self.seconds[part] = self.seconds.get(part, 0.0) + begin.until(end)


class Clock:
    """The part that time goes to now, from its making on. device: whose time is taken: a GPU's, or else the host's."""

    def __init__(self, device: torch.device, part: str) -> None:
        self._stream = compute_stream(device)
        self.part = part
        self._last = self._mark()
        self._interval = Interval()

    def _mark(self) -> Mark:
        return HostMark() if self._stream is None else DeviceMark(self._stream)

    def enter(self, part: str) -> str:
        """Time goes to `part` from now on. Gives the part that it went to."""
        before = self.part
        if part != before:
            now = self._mark()
            self._interval.add(before, self._last, now)
            self._last, self.part = now, part
        return before

    def cut(self, *, before_part: bool = False) -> Interval:
        """The interval since the last cut; another one begins. before_part: it began with the part that time goes to now."""
        if not before_part:
            now = self._mark()
            self._interval.add(self.part, self._last, now)
            self._last = now
        interval, self._interval = self._interval, Interval()
        return interval
