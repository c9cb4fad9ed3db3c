"""What a script under DeepSpeed's verbs does around a backward: `loss.backward()`, boundaries of its own, the loss scale."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rig.engine import Tower, inputs, largest_difference, mine, tower
from shardwise.compat.deepspeed.building import Init
from shardwise.compat.deepspeed.entry import initialize
from shardwise.compat.deepspeed.fragments import (
    safe_get_full_grad,
    safe_set_full_grad,
    safe_update_full_grad_vectorized,
)
from shardwise.compat.deepspeed.gathering import GatheredParameters, ZeroParamStatus
from shardwise.errors import ConfigError, ScheduleError


class Told(nn.Module):
    """Gives its loss, and what the loss was made of."""

    def __init__(self, inner: Tower) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.inner(x)
        return {"loss": out.square().mean(), "out": out}


def loss_of(given: dict[str, Tensor]) -> Tensor:
    return given["loss"].float() + 0.1 * given["out"].float().mean()


def started(stage: int, **more: Any) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """(an engine, a plain copy of its model, the copy's optimizer)."""
    model = Told(tower())
    reference = copy.deepcopy(model)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0,
        **more,
    }
    engine, *_ = initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    return engine, reference, torch.optim.SGD(reference.parameters(), lr=0.1)


def plain_backward(reference: nn.Module, batch: Tensor, ranks: Any, share: float) -> None:
    for rank in range(ranks.world_size):
        (loss_of(reference(mine(batch, rank, ranks.world_size))) * share / ranks.world_size).backward()


def same(engine: Any, reference: nn.Module, tolerance: float = 1e-6) -> None:
    with GatheredParameters(engine.module.parameters()):
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    assert largest_difference(weights, reference) <= tolerance


def _own_backward(ranks: Any, stage: int) -> None:
    engine, reference, plain = started(stage, gradient_accumulation_steps=3)
    for number, batch in enumerate(inputs(6)):
        plain_backward(reference, batch, ranks, 1 / 3)
        loss = loss_of(engine(mine(batch, ranks.rank, ranks.world_size)))
        if number % 3 == 0:
            loss.backward()
        elif number % 3 == 1:
            engine.backward(loss)
        else:
            engine.scale(loss).backward()
        engine.step()
        assert engine.was_step_applied() == (number % 3 == 2)
        if number % 3 == 2:
            plain.step()
            plain.zero_grad()
    assert engine.global_steps == 2
    same(engine, reference)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scripts_own_backward_counts_as_the_engines(world, stage):
    world(2).run(_own_backward, stage)


def _summed(ranks: Any, stage: int) -> None:
    engine, reference, plain = started(stage, gradient_accumulation_steps=2, gradient_allreduce_op="SUM")
    for number, batch in enumerate(inputs(2)):
        plain_backward(reference, batch, ranks, ranks.world_size / 2)
        loss = loss_of(engine(mine(batch, ranks.rank, ranks.world_size)))
        (engine.backward if number else torch.Tensor.backward)(loss)
        engine.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    torch.testing.assert_close(engine.get_global_grad_norm(), norm, rtol=1e-5, atol=0)
    plain.step()
    same(engine, reference)
    with pytest.raises(ConfigError, match="gradient_allreduce_op: 'max' is neither mean nor sum"):
        started(stage, gradient_allreduce_op="max")
    with pytest.raises(ConfigError, match=r"checkpoint\.tag_validation: 'none' is none of ignore, warn, fail"):
        started(stage, checkpoint={"tag_validation": "none"})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_may_be_added_over_the_ranks(world, stage):
    world(2).run(_summed, stage)


def _without_scale(ranks: Any, stage: int) -> None:
    engine, reference, _ = started(stage, fp16={"enabled": True, "initial_scale_power": 10})
    batch = inputs(1)[0]
    part = mine(batch, ranks.rank, ranks.world_size)
    for _ in range(2):
        with pytest.raises(
            ScheduleError, match=r"Call engine\.backward\(loss\), or engine\.scale\(loss\)\.backward\(\)"
        ):
            loss_of(engine(part)).backward()
        engine.zero_grad()
    plain_backward(reference, batch, ranks, 1.0)
    for backward in (lambda loss: engine.scale(loss).backward(), engine.backward, engine.optimizer.backward):
        backward(loss_of(engine(part)))
        for own, theirs in zip(engine.module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(safe_get_full_grad(own), theirs.grad, rtol=2e-2, atol=2e-3)
        engine.zero_grad()


@pytest.mark.parametrize("stage", [1, 3])
def test_in_fp16_a_backward_without_the_loss_scale_is_refused(world, stage):
    world(2).run(_without_scale, stage)


def _own_boundaries(ranks: Any, stage: int) -> None:
    engine, reference, plain = started(stage, gradient_accumulation_steps=4, managed_gradient_accumulation=False)
    batches = iter(inputs(6))
    for count in (1, 3, 2):
        for _ in range(count):
            batch = next(batches)
            plain_backward(reference, batch, ranks, 1 / count)
            assert not engine.is_gradient_accumulation_boundary()
            engine.backward(loss_of(engine(mine(batch, ranks.rank, ranks.world_size))) / count, scale_wrt_gas=False)
        engine.step()
        assert engine.was_step_applied()
        plain.step()
        plain.zero_grad()
    assert (engine.global_steps, engine.global_samples, engine.managed_gradient_accumulation()) == (3, 72, False)
    same(engine, reference)
    with pytest.raises(ConfigError, match="managed_gradient_accumulation: 'no' is neither true nor false"):
        started(stage, managed_gradient_accumulation="no")


@pytest.mark.parametrize("stage", [1, 3])
def test_a_script_may_own_the_boundaries(world, stage):
    world(2).run(_own_boundaries, stage)


def _forget(ranks: Any, stage: int) -> None:
    """zero_grad counts wherever it is called: also between the micro-batches of a step, and within no_sync."""
    engine, reference, plain = started(stage, gradient_accumulation_steps=2)
    first, second, third = inputs(3)
    parts = [mine(batch, ranks.rank, ranks.world_size) for batch in (first, second, third)]
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss_of(engine(parts[0])))
    (engine if stage < 2 else engine.optimizer).zero_grad()
    assert safe_get_full_grad(next(engine.module.parameters())) is None
    if stage < 2:
        with engine.no_sync():
            engine.backward(loss_of(engine(parts[0])))
            engine.zero_grad()
    engine.backward(loss_of(engine(parts[1])))
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss_of(engine(parts[2])))
    engine.step()
    for batch in (second, third):
        plain_backward(reference, batch, ranks, 1 / 2)
    plain.step()
    same(engine, reference)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_grad_forgets_what_is_accumulated(world, stage):
    world(2).run(_forget, stage)


def _fp16_gradients(ranks: Any, stage: int) -> None:
    """At the loss scale that DeepSpeed begins with, values of fp16 stay finite; the scale of the next loss is told at once."""
    engine, *_ = started(stage, fp16={"enabled": True, "hysteresis": 1})
    optimizer = engine.optimizer
    part = mine(inputs(1)[0], ranks.rank, ranks.world_size)
    parameters = list(engine.module.parameters())
    for value, applied in ((0.75, True), (float("nan"), False), (0.5, True)):
        engine.backward(loss_of(engine(part)))
        before = optimizer.loss_scale
        for parameter in parameters:
            safe_set_full_grad(parameter, torch.full(parameter.shape, value, dtype=torch.float16))
        found = safe_get_full_grad(parameters[0])
        assert torch.equal(found, torch.full_like(found, value)) or not applied
        engine.step()
        assert optimizer.overflow != applied
        assert optimizer.loss_scale == optimizer.loss_scaler.cur_scale == (before if applied else before / 2)
    assert (optimizer.loss_scaler.cur_iter, optimizer.loss_scale, engine.skipped_steps) == (3, 2.0**15, 1)
    engine.backward(loss_of(engine(part)))
    safe_update_full_grad_vectorized(
        parameters, lambda gradient, parameter: torch.full_like(gradient, parameter.numel())
    )
    for parameter in parameters:
        assert torch.equal(safe_get_full_grad(parameter), torch.full(parameter.shape, float(parameter.numel())))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_fp16_are_written_at_the_largest_scale(world, stage):
    world(2).run(_fp16_gradients, stage)


def _marks(ranks: Any) -> None:
    with Init(config_dict_or_path={"zero_optimization": {"stage": 3}}), Init():
        assert torch.distributed.is_initialized()
        model = Told(Tower())
        large = nn.Linear(300, 300)
    outside = nn.Linear(2, 2)
    for parameter in (model.inner.head.bias, large.weight):
        assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
        with GatheredParameters([parameter, outside.weight], modifier_rank=1):
            assert parameter.ds_status is ZeroParamStatus.AVAILABLE
            if ranks.rank == 1:
                with torch.no_grad():
                    parameter.fill_(7.0)
        with GatheredParameters(parameter):
            assert torch.equal(parameter, torch.full_like(parameter, 7.0))
        assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
    numbers = [parameter.ds_id for parameter in model.parameters()]
    assert len(set(numbers)) == len(numbers)
    assert not hasattr(outside.weight, "ds_id")
    engine, *_ = initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={"train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": 3}},
    )
    weight = model.inner.blocks[1].up.weight
    assert [parameter.ds_id for parameter in model.parameters()] == numbers
    seen = []
    model.inner.blocks[1].register_forward_hook(lambda *_: seen.append(weight.ds_status))
    loss_of(engine(mine(inputs(1)[0], ranks.rank, ranks.world_size))).backward()
    assert (seen, weight.ds_status) == ([ZeroParamStatus.AVAILABLE], ZeroParamStatus.NOT_AVAILABLE)
    with GatheredParameters(weight):
        assert weight.ds_status is ZeroParamStatus.AVAILABLE
    assert weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    with tempfile.TemporaryDirectory() as directory:
        for wrong in (None, ""):
            with pytest.raises(ConfigError, match="names no directory"):
                engine.save_checkpoint(wrong)
        assert not list(Path(directory).iterdir())


def test_parameters_have_their_marks_from_the_constructor_on(world):
    world(2).run(_marks)


class Written(nn.Module):
    """Has weights that a constructor writes on rank 0 alone: large, changed by another operation, and small ones."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(300, 301))
        self.other = nn.Parameter(torch.ones(90_001))
        self.same = nn.Parameter(torch.full((200, 300), 3.0))
        self.small = nn.Parameter(torch.zeros(5))
        with torch.no_grad():
            self.other.mul_(2.0 + rank)
            if rank == 0:
                self.large[100:].fill_(7.0)
                self.small.fill_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.large.sum()


def _rank_0_alone(ranks: Any) -> None:
    with Init(config_dict_or_path={"zero_optimization": {"stage": 3}}):
        model = Written(ranks.rank)
    assert model.large.is_meta
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    expected = Written(0)
    same(engine, expected, 0.0)


def test_what_a_constructor_writes_on_rank_0_alone_is_everybodys(world):
    world(3).run(_rank_0_alone)
