"""Memory that another process can map ends with the process that made it letting go, whoever was forked meanwhile."""

from __future__ import annotations

import gc
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from shardwise.offload import pinned
from shardwise.offload.pinned import SharedMemory, shared_memory

NBYTES = 8 << 20


def _made() -> SharedMemory:
    made = shared_memory(NBYTES, pinned=False)
    made.tensor.fill_(7)
    return made


def _rests(descriptor: int) -> int:
    """Bytes of the file that are in memory."""
    return os.fstat(descriptor).st_blocks * 512


@pytest.fixture
def forked():
    """Forks a process that runs a function and then stays as long as the test."""
    pids: list[int] = []

    def fork(function=lambda: None):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                function()
                os.write(writer, b"1")
                time.sleep(60)
            finally:
                os._exit(1)
        pids.append(pid)
        assert os.read(reader, 1)
        for end in (reader, writer):
            os.close(end)

    yield fork
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_its_pages_are_given_back_while_a_forked_process_has_them_mapped(forked):
    made = _made()
    witness = os.dup(made.descriptor)
    forked()
    assert _rests(witness) >= NBYTES
    del made
    gc.collect()
    assert _rests(witness) == 0
    os.close(witness)


def test_a_forked_process_that_lets_go_of_it_takes_nothing_away(forked):
    held = [_made()]

    def let_go():
        held.clear()
        gc.collect()

    forked(let_go)
    assert torch.equal(held[0].tensor, torch.full((NBYTES,), 7, dtype=torch.uint8))
    assert _rests(held[0].descriptor) >= NBYTES


def test_pinned_memory_is_unregistered_before_its_pages_go(monkeypatch):
    """With what registers it played: what is copied is waited for there."""
    found: list[int] = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(pinned, "_unregister", lambda *_: found.append(_rests(witness)))
    made = shared_memory(NBYTES, pinned=True)
    made.tensor.fill_(7)
    witness = os.dup(made.descriptor)
    del made
    gc.collect()
    assert found == [pytest.approx(NBYTES, rel=0.01)]
    assert _rests(witness) == 0
    os.close(witness)
