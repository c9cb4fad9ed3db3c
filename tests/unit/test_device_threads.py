"""Threads that transfers run on: on the right device, or with one error for each task, and nothing is kept by what failed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import shardwise
from shardwise.errors import StoreError
from shardwise.offload import threads
from shardwise.offload.host import HostStore, Ring
from shardwise.offload.nvme import NvmeStore
from shardwise.offload.striping import BLOCK
from shardwise.ranks import lanes
from shardwise.ranks.lanes import Lanes

SOURCE = Path(shardwise.__file__).parent
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Device:
    """A second CUDA device that comes and goes."""

    def __init__(self, monkeypatch):
        self.there = True
        self.taken = []
        monkeypatch.setattr(torch.cuda, "set_device", self.take)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)

    def take(self, device):
        if not self.there:
            raise RuntimeError("CUDA error: device is gone")
        self.taken.append(device)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def nothing():
    pass


def test_a_thread_that_cannot_use_its_device_says_why_until_it_can(device):
    pool = threads.DeviceThreads(1, "shardwise-test", torch.device("cuda", 1))
    given_back = []
    device.there = False
    for count in (1, 2):
        with pytest.raises(StoreError, match="shardwise-test_0 could not use cuda:1: CUDA error: device is gone"):
            pool.submit(nothing, lambda: given_back.append(1)).result()
        assert len(given_back) == count
    device.there = True
    for _ in range(3):
        pool.submit(nothing).result()
    assert device.taken == [torch.device("cuda", 1)], "once for each thread"
    pool.close()


def test_a_device_without_an_index_is_the_current_one_of_who_brings_it(device):
    assert lanes.whole_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert lanes.whole_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert lanes.whole_device(torch.device("cpu")) == torch.device("cpu")
    assert Lanes(torch.device("cuda"), serial=True).device == torch.device("cuda", 2)
    pool = threads.DeviceThreads(1, "shardwise-test", torch.device("cuda"))
    pool.submit(nothing).result()
    assert device.taken == [torch.device("cuda", 2)]
    pool.close()


def test_a_drive_whose_threads_lose_their_device_keeps_no_blocks_and_goes_on_with_the_next(tmp_path, device):
    store = NvmeStore(tmp_path, Lanes(torch.device("cpu")), 0)
    slab = store.allocate((Ring.LENGTH + 4) * BLOCK, torch.uint8, "weights")
    content = torch.full((slab.numel,), 5, dtype=torch.uint8)
    store.drives[0].threads._device = torch.device("cuda", 1)
    device.there = False
    for given in (False, True):
        slab.put_parts([content], given=given)  # more than all blocks: it would wait for ever for one that was lost
        with pytest.raises(StoreError, match="could not use cuda:1"):
            store.drain()
    with pytest.raises(StoreError, match="could not use cuda:1"):
        slab.read_part(0, slab.numel)
    device.there = True
    slab.put_parts([content])
    store.drain()
    assert torch.equal(slab.read_part(0, slab.numel), content)
    store.close()


def test_host_memory_whose_threads_lose_their_device_keeps_no_blocks(device):
    store = HostStore(Lanes(torch.device("cpu")))
    slab = store.allocate((Ring.LENGTH + 4) * BLOCK // 4, torch.float32, "gradients")
    store._adding._device = torch.device("cuda", 1)
    device.there = False
    source = torch.ones(slab.numel)
    for _ in range(2):
        additions: list = []
        store._bringing.submit(lambda added=additions: store._bring(source, slab, None, [], added)).result()
        for addition in additions:
            with pytest.raises(StoreError, match="could not use cuda:1"):
                addition.result()
    store.close()


def test_no_pool_has_an_initializer_and_tasks_of_a_device_have_one_home():
    """Where a pool's initializer fails, the pool is broken for good, and no task is told why."""
    pools = set()
    for path in (*SOURCE.rglob("*.py"), *BENCHMARKS.rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            assert not any(keyword.arg == "initializer" for keyword in call.keywords), path
            if (
                getattr(call.func, "attr", getattr(call.func, "id", "")) == "ThreadPoolExecutor"
                and SOURCE in path.parents
            ):
                pools.add(str(path.relative_to(SOURCE)))
    of_the_host = {"offload/pinned.py", "files/apart.py"}  # these touch host memory alone
    assert pools == {"offload/threads.py"} | of_the_host, "take DeviceThreads"
