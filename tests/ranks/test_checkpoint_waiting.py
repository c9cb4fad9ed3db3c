"""A save waits as long as a disk takes, says for whom, and notices a rank that is gone."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks.test_checkpoint_failures import Net
from rig.heard import heard
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint import patience
from shardwise.checkpoint.read import Checkpoint
from shardwise.errors import CheckpointError
from shardwise.files import disk
from shardwise.ranks import agree
from shardwise.run.plugins import InitProcessGroupKwargs
from shardwise.run.process import forget_run

SLOW_S = 4.0


@contextmanager
def impatient(timeout_s: float, *, together: bool = True) -> Iterator[tuple[Accelerator, Net, Any]]:
    """A run whose collectives wait for so long only, and which says twice a second for whom a save waits.

    together: the ranks still are when it ends, so that the weights can be given back.
    """
    forget_run()
    kept, patience.SAY_EVERY_S = patience.SAY_EVERY_S, 0.4
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_s))
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3), kwargs_handlers=[timeout])
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    accelerator.prepare(model, optimizer)
    try:
        yield accelerator, model, optimizer
    finally:
        patience.SAY_EVERY_S = kept
        if together:
            accelerator.free_memory()
        forget_run()


def _train(accelerator: Accelerator, model: Net, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(2, 6)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def _slow(ranks: Any, folder: str, who: int, operation: str, async_: bool) -> tuple[float, list[str]]:
    target = Path(folder) / "state"

    def sleeps(found: str, path: Path) -> None:
        if found == operation and ranks.rank == who and not slept:
            slept.append(path)
            time.sleep(SLOW_S)

    with impatient(2.0) as (accelerator, model, optimizer), heard() as lines, disk.watched(sleeps):
        slept: list[Path] = []
        _train(accelerator, model, optimizer)
        began = time.monotonic()
        accelerator.save_state(target, async_=async_)
        if async_:
            assert time.monotonic() - began < SLOW_S
            accelerator.finish_saving()
        took = time.monotonic() - began
        accelerator.load_state(target)
        accelerator._run.folder.release()
    Checkpoint(target).verify()
    return took, lines


@pytest.mark.parametrize(
    ("who", "operation", "async_", "words"),
    [
        (1, "write", False, "rank 1: writes, 0 MiB left; 1 of 2 ranks are done"),
        (1, "write", True, "rank 1: writes"),
        (0, "move", False, "rank 0: gives the checkpoint its name; 1 of 2 ranks are done"),
    ],
)
def test_a_disk_slower_than_a_collective_waits_is_waited_for(world, tmp_path, who, operation, async_, words):
    results = world(2).run(_slow, str(tmp_path), who, operation, async_)
    for took, _ in results:
        assert SLOW_S <= took < SLOW_S + 20
    lines = results[0][1]
    assert len(lines) >= 3
    assert all(f"Saving {tmp_path / 'state'}: for " in line for line in lines), lines
    assert sum(words in line for line in lines) >= 2, lines
    assert results[1][1] == []


def _slow_load(ranks: Any, folder: str) -> list[str]:
    target = Path(folder) / "state"
    with impatient(2.0) as (accelerator, model, optimizer), heard() as lines:
        _train(accelerator, model, optimizer)
        accelerator.save_state(target)
        run = accelerator._run.state()
        assert run.models
        original = type(run).restore_tensors

        def restore(*args: Any) -> None:
            if ranks.rank == 1:
                time.sleep(SLOW_S)
            original(*args)

        type(run).restore_tensors = restore  # type: ignore[method-assign]
        try:
            accelerator.load_state(target)
        finally:
            type(run).restore_tensors = original  # type: ignore[method-assign]
        accelerator._run.folder.release()
    return lines


def test_a_load_waits_as_well(world, tmp_path):
    lines = world(2).run(_slow_load, str(tmp_path))[0]
    assert lines
    assert all("Loading" in line and "rank 1: reads its part" in line for line in lines)


def _stopped(ranks: Any, folder: str) -> tuple[str, float]:
    """Rank 1 is stopped in the middle of its writing, and goes on when rank 0 has given up."""
    pids = ranks.gather_objects(os.getpid())
    with impatient(1.7, together=False) as (accelerator, model, optimizer):
        _train(accelerator, model, optimizer)

        def stop(operation: str, path: Path) -> None:
            if ranks.rank == 1 and operation == "write" and not stopped:
                stopped.append(path)
                os.kill(os.getpid(), signal.SIGSTOP)

        stopped: list[Path] = []
        began = time.monotonic()
        try:
            with disk.watched(stop):
                accelerator.save_state(Path(folder) / "state")
        except CheckpointError as error:
            return str(error), time.monotonic() - began
        finally:
            if ranks.rank == 0:
                os.kill(pids[1], signal.SIGCONT)
            accelerator._run.folder.release()
    return "saved", 0.0


def test_a_rank_that_is_gone_is_noticed(world, tmp_path):
    words, took = world(2).run(_stopped, str(tmp_path))[0]
    assert "was not saved" in words
    assert "rank 1 keeps the others waiting: " in words
    assert "rank 0 waits in save_state" in words
    assert took < 20
    assert not (tmp_path / "state").exists()


def _interrupted(ranks: Any, folder: str) -> str:
    with impatient(15.0) as (accelerator, model, optimizer):
        _train(accelerator, model, optimizer)

        def interrupt(operation: str, path: Path) -> None:
            if ranks.rank == 1 and operation == "write":
                raise KeyboardInterrupt

        try:
            with disk.watched(interrupt):
                accelerator.save_state(Path(folder) / "state")
        except CheckpointError as error:
            return str(error)
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            accelerator._run.folder.release()
    return "saved"


def test_an_interrupt_of_one_rank_is_told_to_the_others(world, tmp_path):
    words = world(2).run(_interrupted, str(tmp_path))
    assert words[1] == "interrupted"
    assert "rank 1: KeyboardInterrupt interrupted it" in words[0]


class Broken:
    """Ranks whose exchanges fail, as when the other ranks have left because of this one's error."""

    rank, world_size, timeout_s = 0, 2, 0.4

    def gather_objects(self, value: Any) -> list[Any]:
        raise RuntimeError("Connection closed by peer [10.0.0.2]:4711\n more")


def test_the_first_cause_is_the_one_that_is_told():
    def fails() -> None:
        raise OSError(28, "No space left on device")

    progress = patience.Progress("writes")
    ranks: Any = Broken()
    with pytest.raises(CheckpointError, match=r"it failed: OSError: \[Errno 28\] No space left"):
        patience.patiently(ranks, fails, progress, what="Saving", failed="it failed: ")
    with pytest.raises(CheckpointError, match=r"another rank is gone, .* \(Connection closed by peer") as error:
        patience.patiently(ranks, lambda: None, progress, what="Saving")
    assert "\n" not in str(error.value)

    def goes_on() -> None:
        for _ in range(200):
            time.sleep(0.05)
            progress.advance(1)

    began = time.monotonic()
    with pytest.raises(CheckpointError, match="another rank is gone"):
        patience.patiently(ranks, goes_on, progress, what="Saving")
    assert time.monotonic() - began < 5


def _exchanges(ranks: Any) -> list[int]:
    """How often ranks talk: an action that ends at once costs what an agreement costs."""
    found = []
    for act in (
        lambda: agree.together(ranks, lambda: 1),
        lambda: patience.patiently(ranks, lambda: 1, patience.Progress("x"), what="x"),
    ):
        seen: list[Any] = []
        original = type(ranks).gather_objects
        type(ranks).gather_objects = lambda self, value: seen.append(value) or original(self, value)  # noqa: B023
        try:
            for _ in range(20):
                act()
        finally:
            type(ranks).gather_objects = original
        found.append(len(seen))
    return found


def test_waiting_with_patience_costs_no_more_messages_where_nobody_waits(world):
    for found in world(2).run(_exchanges):
        assert found == [20, 20]
