"""Lanes: the CUDA streams on which gathers, reductions and host copies run beside the computation.

A lane is an ordered queue of device work. The compute lane is whatever stream the user's code runs on. Orders between lanes
are events: `mark` on one, `wait` on the other. Memory rule of the engine: what a lane allocates, that lane frees, after it
has waited for the lanes that read it; so the caching allocator never hands out a block that is still being read, and no
tensor needs record_stream. On a CPU device every lane is the calling thread and there is nothing to order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def whole_device(device: torch.device) -> torch.device:
    """`device` with its index: which CUDA device is current may differ later, and on another thread.

    Every device that is given from outside comes through here: tensors say cuda:0 and never cuda, so do comparisons.
    """
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


class _Previous(threading.local):
    """The streams that were current before, a list for each thread: disk threads enqueue copies too."""

    def __init__(self) -> None:
        self.streams: list[torch.Stream] = []


class Lane:
    """One queue of device work; `on()` makes it current. Any thread may use it."""

    # torch.Stream and torch.accelerator, not torch.cuda: those are C++, these make a Python object at every question.

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.Stream(device) if device.type == "cuda" else None
        self._index = device.index
        self._previous = _Previous()

    def on(self) -> Lane:
        """`with lane.on():` what is enqueued inside runs on this lane."""
        return self

    # A context manager by hand: a generator would cost more than what is done inside, four times per unit and step.

    def __enter__(self) -> None:
        if self.stream is not None:
            self._previous.streams.append(torch.accelerator.current_stream(self._index))
            torch.accelerator.set_stream(self.stream)

    def __exit__(self, *exception: object) -> None:
        if self.stream is not None:
            torch.accelerator.set_stream(self._previous.streams.pop())

    def mark(self) -> torch.Event | None:
        """An event that is done when everything enqueued on this lane so far is."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, event: torch.Event | None) -> None:
        """Hold what is enqueued on this lane from now on until `event` is done. Returns at once."""
        if self.stream is not None and event is not None:
            self.stream.wait_event(event)

    def synchronize(self) -> None:
        """Hold the host until the lane is empty."""
        if self.stream is not None:
            self.stream.synchronize()


def compute_stream(device: torch.device) -> torch.Stream | None:
    """The stream on which this thread computes on `device`; None on a CPU."""
    return torch.accelerator.current_stream(device.index) if device.type == "cuda" else None


def timed_mark(stream: torch.Stream) -> torch.Event:
    """An event that is done when everything enqueued on `stream` so far is, and that knows when that was."""
    event = torch.Event(stream.device, enable_timing=True)
    event.record(stream)
    return event


class Lanes:
    """gather: brings weights together. reduce: sums gradients. up, down: move shards from and to another tier, one stream
    for each way, because the link carries both at once. step: runs the optimizer on states that visit the device.

    They belong to one ShardedModel; models prepared side by side do not wait for each other.
    device: a CUDA device without an index is the current one.
    serial: every lane is the compute stream. Nothing overlaps then; it is what an overlapped run is held against.
    """

    def __init__(self, device: torch.device, *, serial: bool = False) -> None:
        self.device = device = whole_device(device)
        self._cuda = device.type == "cuda"
        lane_device = torch.device("cpu") if serial else device
        self.gather = Lane(lane_device)
        self.reduce = Lane(lane_device)
        self.up = Lane(lane_device)
        self.down = Lane(lane_device)
        self.step = Lane(lane_device)
        self._before_states: list[Callable[[], None]] = []

    def before_states_change(self, call: Callable[[], None]) -> None:
        """Have `call` run once, before the optimizer's states on the device are written next: it is still reading them."""
        self._before_states.append(call)

    def states_change(self) -> None:
        """The optimizer's states are about to be written, by what is enqueued on the compute lane after this."""
        while self._before_states:  # one that Ctrl-C has met is still to be made before the next step
            self._before_states[0]()
            self._before_states.pop(0)

    def mark_compute(self) -> torch.Event | None:
        """An event that is done when the computation enqueued so far is."""
        return torch.accelerator.current_stream(self.device.index).record_event() if self._cuda else None

    def compute_waits(self, event: torch.Event | None) -> None:
        """Hold the computation enqueued from now on until `event` is done."""
        if event is not None:
            torch.accelerator.current_stream(self.device.index).wait_event(event)

    def marks(self) -> list[torch.Event | None]:
        """Events that are done when everything that was enqueued on any lane so far is."""
        return [lane.mark() for lane in (self.gather, self.reduce, self.up, self.step, self.down)]

    def join(self) -> None:
        """The computation waits for every lane."""
        for event in self.marks():
            self.compute_waits(event)

    def synchronize(self) -> None:
        """The host waits for every lane and for the computation."""
        if self._cuda:
            torch.cuda.synchronize(self.device)
