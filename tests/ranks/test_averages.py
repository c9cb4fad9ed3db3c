"""`accelerator.ema`: torch's AveragedModel, with each rank averaging its own shards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardwise
from ranks.test_front_training import fresh
from rig.engine import Tower, adamw, inputs, largest_difference, loss_of, mine, prepare, tower, weights_of
from rig.tiny import tiny_llama
from shardwise.errors import CheckpointError, ConfigError, PrepareError

SETTINGS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")]
DECAY = 0.8


class Run:
    """A script under an Accelerator, and the same in plain torch beside it."""

    def __init__(self, ranks: Any, stage: int, offload: str, **keywords: Any) -> None:
        self.ranks = ranks
        self.accelerator = fresh(stage, offload, **keywords)
        self.model, self.reference = tower(), tower()
        self.optimizer, self.plain = adamw(self.model.parameters()), adamw(self.reference.parameters())
        self.accelerator.prepare(self.model, self.optimizer)
        self.ema = self.accelerator.ema(self.model, decay=DECAY)
        self.average = AveragedModel(self.reference, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def mine(self, batch: Tensor) -> Tensor:
        return mine(batch, self.ranks.rank, self.ranks.world_size)

    def train(self, steps: int, seed: int = 6) -> None:
        for batch in inputs(steps, seed=seed):
            loss_of(self.reference, batch).backward()
            self.accelerator.backward(loss_of(self.model, self.mine(batch)))
            for optimizer in (self.plain, self.optimizer):
                optimizer.step()
                optimizer.zero_grad()
            self.average.update_parameters(self.reference)
            self.ema.update()

    def weights(self) -> dict[str, Tensor]:
        with shardwise.gathered(self.model):
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def check(self, tolerance: float = 1e-6) -> None:
        """The average, as weights, in a forward, and as a copy; and the weights themselves afterwards, to the bit."""
        before = self.weights()
        assert largest_difference(before, self.reference) <= tolerance
        with self.ema.swapped():
            assert largest_difference(self.weights(), self.average.module) <= tolerance
            x = self.mine(inputs(1, seed=9)[0])
            with torch.no_grad():
                assert torch.allclose(self.model(x).float(), self.average(x), atol=10 * tolerance)
            with shardwise.gathered(self.model):
                found = copy.deepcopy(self.model)
        assert largest_difference(dict(found.named_parameters()), self.average.module) <= tolerance
        after = self.weights()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def _averaged(ranks: Any, stage: int, offload: str) -> None:
    run = Run(ranks, stage, offload)
    with run.ema.swapped():  # before the first update it is the model as it was
        assert largest_difference(run.weights(), tower()) == 0
    run.train(3)
    run.check()
    run.train(2, seed=7)
    run.check()
    run.accelerator.free_memory()
    with pytest.raises(PrepareError, match=r"ema\.update: its Tower has been released"):
        run.ema.update()


@pytest.mark.parametrize(("stage", "offload"), SETTINGS)
def test_averages_are_torch_s(world, stage, offload):
    world(1).run(_averaged, stage, offload, timeout_s=30)
    world(2).run(_averaged, stage, offload, timeout_s=30)


def _masters_are_averaged(ranks: Any, stage: int) -> float:
    """In bf16 a change of 1/1000 of a weight is lost in the weight, and is not in the average of the masters."""
    accelerator = fresh(stage, mixed_precision="bf16")
    model = Tower()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    accelerator.prepare(model, optimizer)
    ema = accelerator.ema(model, decay=0.5)
    for _ in range(4):
        accelerator.backward(sum(p.float().sum() for p in model.parameters()))  # gradients of one
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    with ema.swapped():
        found = accelerator.get_state_dict(model)
    accelerator.free_memory()
    return float(found["head.bias"][0]) if ranks.rank == 0 else 0.0


@pytest.mark.parametrize("stage", [0, 2])
def test_masters_are_averaged_not_their_rounding(world, stage):
    expected = 0.999
    for step in (2, 3, 4):
        expected = (expected + 1 - step / 1000) / 2
    assert world(2).run(_masters_are_averaged, stage, timeout_s=30)[0] == pytest.approx(expected, abs=1e-6)


def _saved(ranks: Any, stage: int, offload: str, folder: str) -> None:
    run = Run(ranks, stage, offload)
    run.train(3)
    run.accelerator.save_state(folder)
    run.accelerator.free_memory()


def _loaded(ranks: Any, stage: int, offload: str, folder: str) -> None:
    """On any number of ranks, stage and tier: the same average, and it goes on."""
    other = Run(ranks, stage, offload)
    for batch in inputs(3):
        loss_of(other.reference, batch).backward()
        other.plain.step()
        other.plain.zero_grad()
        other.average.update_parameters(other.reference)
    other.accelerator.load_state(folder)
    assert other.ema.updates == 3
    other.check()
    other.train(2, seed=8)
    other.check()
    other.accelerator.free_memory()


@pytest.mark.parametrize(("stage", "offload"), SETTINGS)
def test_averages_are_saved_and_loaded(world, stage, offload, tmp_path: Path):
    folder = str(tmp_path / "state")
    world(2).run(_saved, stage, offload, folder, timeout_s=30)
    world(2).run(_loaded, stage, offload, folder, timeout_s=30)
    world(1).run(_loaded, 3 - stage, "none", folder, timeout_s=30)


def _refused(ranks: Any, folder: str) -> list[str]:
    run = Run(ranks, 3, "none")
    run.train(1)
    said: list[str] = []

    def told(error: type[Exception], action: Any) -> None:
        with pytest.raises(error) as caught:
            action()
        said.append(str(caught.value))

    with run.ema.swapped():
        told(PrepareError, run.ema.update)
        told(PrepareError, run.ema.swapped().__enter__)
        told(PrepareError, run.optimizer.step)
        told(PrepareError, lambda: run.accelerator.save_state(folder))
    with pytest.raises(ZeroDivisionError), run.ema.swapped():
        raise ZeroDivisionError
    run.check()
    told(PrepareError, lambda: run.accelerator.ema(nn.Linear(2, 2)))
    told(ConfigError, lambda: run.accelerator.ema(run.model, decay=1.5))
    told(ConfigError, lambda: run.accelerator.ema(run.model, decay=0.5 + 0.1 * ranks.rank))
    run.accelerator.save_state(folder)
    run.accelerator.free_memory()
    without = fresh(3)
    model = tower()
    without.prepare(model, adamw(model.parameters()))
    without.load_state(folder)  # what a run has none of is left out
    without.ema(model)
    without.ema(model)
    told(CheckpointError, lambda: without.load_state(folder))
    without.free_memory()
    return said


def test_what_cannot_be_is_said(world, tmp_path: Path):
    first, second = world(2).run(_refused, str(tmp_path / "state"), timeout_s=60)
    assert first == second
    expected = [
        "inside `swapped`", "inside `swapped`", "optimizer.step() inside `ema.swapped()`", "inside `ema.swapped()`",
        "is not prepared", "not between 0 and 1", "rank", "saved with 1 average(s)",
    ]  # fmt: skip
    for text, part in zip(first, expected, strict=True):
        assert part in text


def _thawed(ranks: Any, stage: int) -> None:
    """What is trained from later on was its own average until then."""
    accelerator = fresh(stage)
    model, reference = tower(), tower()
    for of in (model, reference):
        of.blocks[1].requires_grad_(False)
    optimizer, plain = adamw(model.parameters()), adamw(reference.parameters())
    accelerator.prepare(model, optimizer)
    ema = accelerator.ema(model, DECAY)
    average = AveragedModel(reference, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step, batch in enumerate(inputs(5)):
        if step == 2:
            for of in (model, reference):
                of.blocks[1].requires_grad_(True)
        loss_of(reference, batch).backward()
        accelerator.backward(loss_of(model, mine(batch, ranks.rank, ranks.world_size)))
        for stepping in (plain, optimizer):
            stepping.step()
            stepping.zero_grad()
        average.update_parameters(reference)
        ema.update()
    with ema.swapped(), shardwise.gathered(model):
        assert largest_difference(dict(model.named_parameters()), average.module) <= 1e-6
    accelerator.free_memory()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_thawed_weights_are_averaged_from_then_on(world, stage):
    world(2).run(_thawed, stage, timeout_s=30)


def _file_of_averages(ranks: Any, folder: str) -> None:
    """save_pretrained inside `swapped` writes the average."""
    from transformers import LlamaForCausalLM

    accelerator = fresh(3)
    model = accelerator.prepare(tiny_llama())
    ema = accelerator.ema(model, 0.5)
    with ema.swapped(), shardwise.gathered(model, modify=True), torch.no_grad():
        model.lm_head.weight.fill_(0.25)  # the average, as a script has set it
    with ema.swapped():
        model.save_pretrained(folder, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    found = LlamaForCausalLM.from_pretrained(folder)
    assert bool((found.lm_head.weight == 0.25).all())
    with shardwise.gathered(model):
        assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    accelerator.free_memory()


def test_save_pretrained_writes_the_average(world, tmp_path: Path):
    world(2).run(_file_of_averages, str(tmp_path), timeout_s=60)


def _on_drives(ranks: Any) -> None:
    sharded, _, stepping = prepare(ranks, tower(), "3-disk")
    ema, reference = shardwise.ShardedEMA(sharded, DECAY), tower()
    plain = adamw(reference.parameters())
    average = AveragedModel(reference, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for batch in inputs(3):
        loss_of(reference, batch).backward()
        loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size)).backward()
        for optimizer in (plain, stepping):
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(reference)
        ema.update()
    with ema.swapped():
        assert largest_difference(weights_of(sharded), average.module) <= 1e-6
    assert largest_difference(weights_of(sharded), reference) <= 1e-6
    sharded.release()


def test_averages_rest_on_drives_too(world):
    world(2).run(_on_drives, timeout_s=30)
