"""A save in the background writes, to the byte, what a save that waits would have written when it was called: whatever the
training does meanwhile, wherever states rest, and whatever has changed since the save before.

What rests in host memory and visits a device is not copied: `as_on_a_device` has it so on a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from rig.engine import as_on_a_device
from rig.heard import heard
from shardwise import Accelerator
from shardwise.checkpoint import file_plan, in_turn, keeping, snapshot
from shardwise.checkpoint.keeping import Keeping
from shardwise.checkpoint.places import MARK
from shardwise.errors import CheckpointError
from shardwise.files import disk, writer
from shardwise.run.process import forget_run
from shardwise.step.optimizer import find_sharded_optimizer

WIDTH = 24
USE_CPU = True  # tests/gpu runs these on devices


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.blocks[0].requires_grad_(False)
        self.register_buffer("seen", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


class Training:
    """A run of Net; `step` takes one that depends on nothing but its number."""

    def __init__(
        self, zero: dict[str, Any], make: Callable[[Any], torch.optim.Optimizer] = _adamw, **engine: Any
    ) -> None:
        forget_run()
        settings = {"mixed_precision": "bf16", "deepspeed_config": zero, "shardwise_config": engine}
        os.environ["SHARDWISE_CONFIG"] = json.dumps({"distributed_type": "DEEPSPEED", "use_cpu": USE_CPU, **settings})
        try:
            self.accelerator = Accelerator(cpu=USE_CPU)
        finally:
            del os.environ["SHARDWISE_CONFIG"]
        self.model = Net()
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.accelerator.prepare(self.model, self.optimizer)
        self.ema = self.accelerator.ema(self.model, 0.9)
        self.steps = 0

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.steps += 1
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(self.steps))
            x = x.to(self.accelerator.device)
            self.accelerator.backward(self.model(x).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def close(self) -> None:
        self.accelerator.finish_saving()
        self.accelerator.free_memory()
        forget_run()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": _adamw,
    "AdamW-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
}


@contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Each write of a block takes so long."""
    with disk.watched(lambda operation, path: time.sleep(seconds) if operation == "write" else None):
        yield


@contextmanager
def written_as_if_large(run: Training) -> Iterator[None]:
    """What was copied by another process, what was kept by threads, all past the page cache."""
    plain, asked, written = snapshot.write_apart, 0, 0

    def write_apart(path: Path, memory: int, stretches: Any, threads: int, advance: Any) -> Any:
        nonlocal asked, written
        asked += 1
        found = plain(path, memory, stretches, threads, advance)
        written += 1
        return found

    with (
        mock.patch.object(snapshot, "_SEVERAL_NBYTES", 0),
        mock.patch.object(writer, "_LARGE", 0),
        mock.patch.object(snapshot, "write_apart", write_apart),
    ):
        yield
    assert written == asked
    assert bool(asked) == bool(run.accelerator._run.pool.nbytes)


@contextmanager
def in_small_pieces() -> Iterator[None]:
    """The save's thread copies states, some elements at a time, until the next step takes the rest."""
    with (
        mock.patch.object(snapshot, "in_pieces", return_value=True),
        mock.patch.object(in_turn, "PIECE_NBYTES", 1000),
    ):
        yield


def _files(folder: Path, rank: int) -> dict[str, bytes]:
    """What this rank has written of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"rank-{rank:05d}.*"))}


def _saved_both_ways(run: Training, rank: int, folder: Path, meanwhile: Callable[[], None]) -> None:
    """Save twice what is now, made anew and waiting, and in the background; they must be equal."""
    run.accelerator._run.standing.clear()
    run.accelerator.save_state(folder / "waiting")
    run.accelerator._run.standing.clear()
    run.accelerator.save_state(folder / "first", async_=True)
    run.accelerator.save_state(folder / "again", async_=True)
    meanwhile()
    run.accelerator.finish_saving()
    expected = _files(folder / "waiting", rank)
    assert expected.keys() == {f"rank-{rank:05d}.json", f"rank-{rank:05d}.safetensors"}
    assert _files(folder / "first", rank) == expected
    assert _files(folder / "again", rank) == expected


def both_ways(ranks: Any, folder: str, stage: int, tier: str, visits: bool, optimizer: str, dtype: str) -> int:
    zero: dict[str, Any] = {"zero_stage": stage, "offload_optimizer_device": tier}
    if tier == "nvme":
        zero["offload_optimizer_nvme_path"] = f"{folder}/drive"
        Path(folder, "drive").mkdir(exist_ok=True)
    with as_on_a_device(512) if visits else nullcontext():
        run = Training(zero, OPTIMIZERS[optimizer], optimizer_state_dtype=dtype)
        for number in range(2):
            run.step(number)
            # The first time as large files are written, the second time in pieces, as a device has it.
            with slow_disk(0.002), in_small_pieces() if number else written_as_if_large(run):
                _saved_both_ways(run, ranks.rank, Path(folder, str(number)), lambda: run.step(2))
        taken = run.accelerator._run.pool.nbytes
        run.close()
    return taken


@pytest.mark.parametrize(
    ("stage", "tier", "visits", "optimizer", "dtype"),
    [
        (0, "none", False, "AdamW", "fp32"),
        (1, "none", False, "AdamW-fused", "fp32"),
        (2, "cpu", True, "AdamW", "fp32"),
        (3, "none", False, "AdamW", "fp32"),
        (3, "none", False, "Adafactor", "fp32"),
        (3, "none", False, "SGD", "fp32"),
        (3, "cpu", True, "AdamW", "fp32"),
        (3, "cpu", False, "AdamW", "fp32"),
        (3, "cpu", True, "Adafactor", "fp32"),
        (3, "cpu", True, "AdamW", "int8"),
        (3, "nvme", False, "AdamW", "fp32"),
    ],
)
def test_a_save_in_the_background_writes_the_bytes_of_one_that_waits(
    world, tmp_path, stage, tier, visits, optimizer, dtype
):
    taken = world(2).run(both_ways, str(tmp_path), stage, tier, visits, optimizer, dtype)
    if visits and dtype == "fp32" and optimizer == "AdamW":
        assert taken == [0, 0], "what visits the device is not copied"


# What has changed since the save before.


def _loaded(run: Training) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def _cleared(run: Training) -> None:
    run.optimizer.state.clear()


def _another_rate(run: Training) -> None:
    run.optimizer.param_groups[0]["lr"] = 0.005


def _thawed(run: Training) -> None:
    weights = list(run.model.blocks[0].parameters())
    for weight in weights:
        weight.requires_grad_(True)
    run.optimizer.add_param_group({"params": weights, "lr": 0.02})


def _other_buffer(run: Training) -> None:
    run.model.register_buffer("more", torch.ones(2))


def _moved(run: Training) -> None:
    state = next(iter(run.optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].clone()


def _changes(ranks: Any, folder: str, visits: bool) -> None:
    tier = "cpu" if visits else "none"
    with as_on_a_device(512) if visits else nullcontext():
        run = Training({"zero_stage": 3, "offload_optimizer_device": tier})
        run.step()
        run.accelerator.save_state(Path(folder, "before"), async_=True)
        changes = [_loaded, _another_rate, _thawed, _other_buffer, _cleared]
        for change in changes if visits else [*changes, _moved]:
            if change is _moved:
                run.step()
            change(run)
            place = Path(folder, change.__name__)
            run.accelerator.save_state(place / "now", async_=True)
            run.accelerator.finish_saving()
            run.accelerator._run.standing.clear()
            run.accelerator.save_state(place / "anew")
            assert _files(place / "now", ranks.rank) == _files(place / "anew", ranks.rank), change.__name__
            run.accelerator.save_state(place / "stood", async_=True)
            run.step()
            run.accelerator.finish_saving()
            assert _files(place / "stood", ranks.rank) == _files(place / "anew", ranks.rank), change.__name__
        run.close()


@pytest.mark.parametrize("visits", [False, True])
def test_what_changes_between_two_saves_is_in_the_second(world, tmp_path, visits):
    world(2).run(_changes, str(tmp_path), visits)


# What a script writes into states itself.


def _spoilt(ranks: Any, folder: str) -> str:
    with as_on_a_device(512):
        run = Training({"zero_stage": 3, "offload_optimizer_device": "cpu"})
        run.step()
        with slow_disk(0.05):
            run.accelerator.save_state(Path(folder, "spoilt"), async_=True)
            for state in run.optimizer.state.values():
                state["exp_avg"].zero_()
            try:
                run.accelerator.finish_saving()
                return "nothing"
            except CheckpointError as error:
                return str(error)
            finally:
                run.close()


def test_states_that_a_script_writes_where_they_are_kept_are_the_saves_error(world, tmp_path):
    for said in world(2).run(_spoilt, str(tmp_path)):
        assert "finish_saving() before" in said
    assert not (tmp_path / "spoilt").exists()


def _removed(ranks: Any, folder: str) -> str:
    run = Training({"zero_stage": 3})

    def before(operation: str, path: Path) -> None:
        if (operation, path.name) == ("sync", MARK):
            shutil.rmtree(path.parent)

    with disk.watched(before):
        try:
            run.accelerator.save_state(Path(folder, "gone"), async_=True)
            run.accelerator.finish_saving()
        except CheckpointError as error:
            return str(error)
        finally:
            run.close()
    return "nothing"


def test_a_directory_that_is_removed_while_it_is_made_is_no_other_machines(world, tmp_path):
    for said in world(2).run(_removed, str(tmp_path)):
        assert "was not saved" in said
        assert "was removed" in said


# Bytes.


def _bound(ranks: Any, folder: str, spares: int) -> tuple[int, int, int]:
    """(the most bytes of spare blocks, bytes of the buffer, bytes that were offloaded)"""
    most: list[int] = []
    kept = file_plan.SPAN_NBYTES, keeping.SPARE_NBYTES, Keeping.close

    def close(self: Keeping) -> None:
        most.append(self.most_spare_nbytes)
        kept[2](self)

    file_plan.SPAN_NBYTES, keeping.SPARE_NBYTES = 512, spares
    Keeping.close = close  # type: ignore[method-assign]
    try:
        with as_on_a_device(512):
            run = Training({"zero_stage": 3, "offload_optimizer_device": "cpu"})
            run.step()
            with slow_disk(0.02):
                _saved_both_ways(run, ranks.rank, Path(folder), lambda: run.step(3))
            found = max(most), run.accelerator._run.pool.nbytes
            offloaded = sum(slab.nbytes for slab in _slabs(run))
            run.close()
    finally:
        file_plan.SPAN_NBYTES, keeping.SPARE_NBYTES, Keeping.close = kept  # type: ignore[method-assign]
    return (*found, offloaded)


def _slabs(run: Training) -> list[Any]:
    (prepared,), stepper = run.accelerator._run.models, find_sharded_optimizer(run.optimizer)
    assert stepper is not None
    states = [slab for unit in stepper.groups.unit_states.values() for slab in unit.slabs.values()]
    return [trained.master for trained in prepared.sharded.trained()] + states


@pytest.mark.parametrize("spares", [0, 2048])
def test_offloaded_states_take_no_more_memory_in_a_save_than_spare_blocks(world, tmp_path, spares):
    for most, buffer, offloaded in world(2).run(_bound, str(tmp_path / "run"), spares):
        assert buffer == 0
        assert 0 < most <= spares if spares else most == 0
        assert offloaded > 4 * 2048


def _written_alone(ranks: Any, folder: str) -> list[str]:
    run = Training({"zero_stage": 3})
    run.step()
    with mock.patch.object(snapshot, "_SEVERAL_NBYTES", 0), mock.patch.object(sys, "executable", None), heard() as said:
        _saved_both_ways(run, ranks.rank, Path(folder), lambda: run.step(2))
    run.close()
    return said


def test_where_no_other_process_writes_this_one_does_and_says_so_once(world, tmp_path):
    for said in world(2).run(_written_alone, str(tmp_path)):
        assert len(said) == 1
        assert "this process writes it, another one did not: it is not known which Python runs this." in said[0]
