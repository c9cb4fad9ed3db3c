"""Slabs are written while steps overwrite them: what is written is what was, and so much spare memory is taken, no more."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from shardwise.checkpoint import keeping
from shardwise.checkpoint.file_plan import FilePlan
from shardwise.checkpoint.keeping import Keeping
from shardwise.checkpoint.patience import Progress
from shardwise.checkpoint.pieces import whole_pieces
from shardwise.checkpoint.snapshot import Pool, Snapshot
from shardwise.errors import CheckpointError
from shardwise.files.writer import TensorFile
from shardwise.offload.store import Slab
from shardwise.plan.plan import Tier

NUMEL = 64


def _slab() -> Slab:
    return Slab(None, Tier.CPU, NUMEL, torch.float32, torch.arange(float(NUMEL)))


def _kept(slab: Slab, block: int = 32) -> Keeping:
    found = Keeping(lambda: None)
    for number, begin in enumerate(range(0, slab.nbytes, block)):
        found.add(slab, begin, begin + block, number)
    found.watch()
    return found


def _write_all(kept: Keeping, seconds: float) -> dict[int, torch.Tensor]:
    written: dict[int, torch.Tensor] = {}
    while True:
        with kept.next_block() as found:
            if found is None:
                return written
            time.sleep(seconds)
            written[found[0]] = found[1].clone()


@pytest.mark.parametrize("spare", [0, 32, 1 << 20])
@pytest.mark.parametrize("writers", [1, 3])
def test_a_step_never_overwrites_what_is_not_written(monkeypatch, spare, writers):
    monkeypatch.setattr(keeping, "SPARE_NBYTES", spare)
    slab = _slab()
    expected = slab.tensor.clone().view(torch.uint8)
    kept = _kept(slab)
    written: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda: written.update(_write_all(kept, 0.002))) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for step in range(3):
        for begin in range(0, NUMEL, 16):
            slab.write_part(begin, torch.full((16,), float(-step)))
    for thread in threads:
        thread.join()
    assert kept.most_spare_nbytes <= spare
    kept.close()
    assert torch.equal(torch.cat([written[number] for number in sorted(written)]), expected)
    assert slab.tensor.eq(-2.0).all()


def test_without_spare_memory_a_step_waits_and_with_it_does_not(monkeypatch):
    for spare, waits in ((0, True), (1 << 20, False)):
        monkeypatch.setattr(keeping, "SPARE_NBYTES", spare)
        slab = _slab()
        kept = _kept(slab)
        step = threading.Thread(target=lambda: slab.write_part(0, torch.zeros(NUMEL)))  # noqa: B023 - joined below
        step.start()
        step.join(0.2)
        assert step.is_alive() == waits
        _write_all(kept, 0.0)
        step.join()
        kept.close()


def test_a_save_that_ends_early_lets_waiting_steps_go(monkeypatch):
    monkeypatch.setattr(keeping, "SPARE_NBYTES", 0)
    slab = _slab()
    kept = _kept(slab)
    step = threading.Thread(target=lambda: slab.write_part(0, torch.zeros(NUMEL)))
    step.start()
    kept.close()
    step.join(10)
    assert not step.is_alive()
    slab.write_part(0, torch.ones(NUMEL))


@pytest.mark.parametrize("who", ["step", "script", "script between steps", "script afterwards"])
def test_who_writes_a_kept_slab_without_asking_is_noticed(who):
    slab = _slab()
    kept = _kept(slab)
    with kept.next_block() as found:
        assert found is not None
    slab.write_part(0, torch.zeros(16))
    if who.startswith("script") and who != "script afterwards":
        slab.tensor[20:30].fill_(7)  # a state that a script has in its hands is such a view
    if who != "script":
        with torch.inference_mode():
            slab.write_part(16, torch.zeros(16))
    _write_all(kept, 0.0)
    if who == "script afterwards":
        slab.tensor[20:30].fill_(7)
        slab.write_part(0, torch.zeros(16))
    assert kept.spoiled == (who in ("script", "script between steps"))
    kept.close()


def test_states_that_a_script_writes_while_they_are_copied_are_the_saves_error(tmp_path):
    state = torch.zeros(4)
    pieces = whole_pieces({"a": torch.ones(2)})
    plan = FilePlan(pieces, "rank-00000.safetensors")
    snapshot = Snapshot(plan, pieces, [], Pool())
    snapshot._versions = [(state, state._version)]
    state.add_(1)
    expected = pytest.raises(CheckpointError, match=r"finish_saving\(\) before")
    with expected, TensorFile(tmp_path / "file", plan.layout) as file:
        snapshot.write(file, Progress("writes"))
