"""What is added to slabs in host memory beside a device: one whose copies are done when it is told so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shardwise.errors import StoreError
from shardwise.offload import host
from shardwise.offload.host import HostStore
from shardwise.offload.store import Done
from shardwise.zero.engine import Engine, Faults, ReductionsInFlight

BLOCK = 4096
BLOCKS = 3 * host.Ring.LENGTH
NUMEL = BLOCKS * BLOCK // 4


class LateLane:
    """Its events are done once `over` is set."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def on(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait(self, event: object) -> None:
        pass

    def mark(self) -> Any:
        def synchronize() -> None:
            assert self.over.wait(timeout=20)

        return SimpleNamespace(synchronize=synchronize)


class Device:
    """The lanes of a device that is neither a CPU nor CUDA: nothing is page-locked."""

    device = torch.device("meta")

    def __init__(self) -> None:
        self.down, self.up = LateLane(), LateLane()
        self.waited: list[object] = []

    def compute_waits(self, event: object) -> None:
        self.waited.append(event)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(host, "BLOCK", BLOCK)
    return Device()


@pytest.fixture
def store(device: Device) -> Iterator[HostStore]:
    made = HostStore(cast(Any, device))
    yield made
    device.down.over.set()
    made.close()


def test_whoever_adds_more_than_the_ring_holds_does_not_wait_for_a_copy(device: Device, store: HostStore) -> None:
    slab = store.allocate(NUMEL, torch.float32, "a gradient")
    slab.tensor.fill_(1.0)
    source = torch.arange(NUMEL, dtype=torch.float32)
    arrivals = [store.add(source, slab, after=None) for _ in range(2)]  # on this thread, while no copy ends
    assert float(slab.tensor.sum()) == NUMEL
    assert store.staging_nbytes <= host.Ring.LENGTH * BLOCK
    device.down.over.set()
    for arrival in arrivals:
        assert arrival.enqueued() is not None
    store.drain()
    torch.testing.assert_close(slab.tensor, 1.0 + 2.0 * source, rtol=0, atol=0)


def test_what_is_put_afterwards_stays(device: Device, store: HostStore) -> None:
    device.down.over.set()
    slab = store.allocate(NUMEL, torch.float32, "a gradient")
    store.add(torch.ones(NUMEL), slab, after=None)
    store.put(torch.full((NUMEL,), 5.0), slab)
    store.drain()
    assert slab.tensor.unique().tolist() == [5.0]


def test_the_step_tells_of_an_addition_that_failed_and_the_backward_does_not(
    device: Device, store: HostStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise StoreError("no memory to lock")

    slab = store.allocate(NUMEL, torch.float32, "a gradient")
    source = torch.ones(NUMEL)
    monkeypatch.setattr(host, "host_tensor", refuse)
    window = ReductionsInFlight(cast(Any, device))
    window.add(store.add(source, slab, after=None), source)
    window.clear()
    assert len(device.waited) == 1  # for what may have been enqueued before it failed
    with pytest.raises(StoreError, match="no memory to lock"):
        store.drain()
    store.drain()


def test_behind_a_drive_that_failed_nothing_is_on_its_way_any_more(device: Device) -> None:
    class Failed:
        def enqueued(self) -> torch.Event | None:
            raise StoreError("made to fail")

    ranks = SimpleNamespace(agree=lambda error: None)
    faults = Faults(cast(Any, ranks))
    engine: Any = SimpleNamespace(lanes=device, faults=faults)
    waited: list[object] = []
    first, last = cast(Any, "first"), cast(Any, "last")
    assert not Engine.land(engine, [Done(first), cast(Any, Failed()), Done(last)], waited.append)
    assert waited[:2] == [first, last]
    assert len(waited) == 3  # and the lane itself: of the failed one some blocks may have come
    assert [str(error) for error in faults.errors] == ["made to fail"]
    assert Engine.land(engine, [Done(first)], waited.append)
