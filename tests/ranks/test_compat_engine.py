"""The engine under DeepSpeed's verbs, and what stands beside it: gathering, building, fragments, checkpoints.

Imported under shardwise's own names, which need no finder.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rig.engine import Tower, inputs, largest_difference, loss_of, mine, tower
from shardwise.compat.deepspeed.building import Init
from shardwise.compat.deepspeed.entry import initialize
from shardwise.compat.deepspeed.fragments import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)
from shardwise.compat.deepspeed.gathering import GatheredParameters, ZeroParamStatus
from shardwise.compat.deepspeed.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from shardwise.errors import CheckpointError, ConfigError, PrepareError, ReleasedParameterError
from shardwise.zero.sharded import find_sharded


def config(stage: int = 3, **more: Any) -> dict[str, Any]:
    device = {"device": more.pop("offload", "none")}
    zero = {"stage": stage, "offload_optimizer": device, **({"offload_param": device} if stage == 3 else {})}
    return {"train_micro_batch_size_per_gpu": 6, "zero_optimization": zero, "gradient_clipping": 0, **more}


ADAMW = {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-4, "weight_decay": 0.01}}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    with GatheredParameters(engine.module.parameters()):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def same(engine: Any, reference: nn.Module, tolerance: float = 1e-6) -> None:
    assert largest_difference(weights(engine), reference) <= tolerance


def _shapes(ranks: Any, stage: int, shape: str, offload: str) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(reference.parameters())
    settings = config(stage, offload=offload, gradient_accumulation_steps=2)
    if shape == "section":
        engine, optimizer, loader, schedule = initialize(
            model=model, model_parameters=iter(model.parameters()), config_params=settings | {"optimizer": ADAMW}
        )
    elif shape == "object":
        engine, optimizer, loader, schedule = initialize(
            model=model, optimizer=adamw(model.parameters()), config=settings
        )
    else:
        engine, optimizer, loader, schedule = initialize(
            model=model,
            optimizer=adamw,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
            config=settings,
        )
    assert (loader, schedule is None) == (None, shape != "functions")
    assert engine.optimizer is optimizer
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    batches = inputs(6)
    for number, batch in enumerate(batches):
        for rank in range(ranks.world_size):
            (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size / 2).backward()
        last = number % 2 == 1
        assert engine.is_gradient_accumulation_boundary() == last
        engine.backward(loss_of(engine, mine(batch, ranks.rank, ranks.world_size)))
        engine.step()
        if last:
            norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
            torch.testing.assert_close(engine.get_global_grad_norm(), norm, rtol=1e-5, atol=0)
            plain.step()
            plain.zero_grad()
    assert (engine.global_steps, engine.micro_steps, engine.skipped_steps, optimizer.overflow) == (3, 6, 0, False)
    same(engine, reference)
    engine.destroy()
    assert find_sharded(model) is None
    assert largest_difference(dict(model.named_parameters()), reference) <= 1e-6
    with pytest.raises(PrepareError, match="has been destroyed"):
        engine.backward(torch.zeros(()))


@pytest.mark.parametrize(
    ("stage", "shape", "offload"),
    [
        (0, "object", "none"),
        (1, "section", "none"),
        (2, "functions", "cpu"),
        (3, "section", "cpu"),
        (3, "object", "none"),
    ],
)
def test_each_shape_of_initialize_trains_as_plain_torch(world, stage, shape, offload):
    world(2).run(_shapes, stage, shape, offload)


def _boundary(ranks: Any, stage: int) -> None:
    """accelerate's way: it says where a step ends, and divides the loss itself or not."""
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(reference.parameters())
    engine, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config_params=config(stage))
    for number, batch in enumerate(inputs(3)):
        for rank in range(ranks.world_size):
            (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
        engine.set_gradient_accumulation_boundary(is_boundary=number == 2)
        engine.backward(loss_of(engine, mine(batch, ranks.rank, ranks.world_size)), scale_wrt_gas=False)
        if number == 2:
            engine.step()
            engine.zero_grad()
    plain.step()
    same(engine, reference)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_boundary_that_is_said_counts(world, stage):
    world(2).run(_boundary, stage)


def _dropped_micro_batches(ranks: Any, stage: int, said: bool) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(reference.parameters())
    settings = config(stage, gradient_accumulation_steps=2, gradient_clipping=0.01)
    engine, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=settings)
    for number, batch in enumerate(inputs(6)):
        last, dropped = number % 2 == 1, number in (1, 4)
        if said:
            engine.set_gradient_accumulation_boundary(last)
        loss = loss_of(engine, mine(batch, ranks.rank, ranks.world_size))
        if not dropped:
            engine.backward(loss)
            for rank in range(ranks.world_size):
                (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size / 2).backward()
        engine.step()
        if last:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
            plain.step()
            plain.zero_grad()
    same(engine, reference)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_behind_a_dropped_micro_batch_has_the_others(world, stage, said):
    world(2).run(_dropped_micro_batches, stage, said)


def _facts(ranks: Any) -> None:
    model = tower()
    model.answer = 42
    engine, _, _, schedule = initialize(
        model=model,
        config=config(1)
        | {
            "optimizer": ADAMW,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 2}},
        },
    )
    assert engine.answer == 42
    assert engine.config["zero_optimization"]["stage"] == 1
    assert engine.module is model
    assert [*engine.parameters()] == [*model.parameters()]
    with pytest.raises(AttributeError, match=r"has no 'no_such', and neither has the model"):
        engine.no_such  # noqa: B018
    assert (engine.train_micro_batch_size_per_gpu(), engine.train_batch_size()) == (6, 6 * ranks.world_size)
    batch = inputs(1)[0]
    with engine.no_sync():
        engine.backward(loss_of(engine, batch))
        with pytest.raises(PrepareError, match="inside of no_sync"):
            engine.step()
    for _ in range(3):
        engine.backward(loss_of(engine, batch))
        engine.step()
    assert engine.get_lr() == [1.0]
    assert schedule.last_batch_iteration == 2
    engine.eval()
    assert not model.training
    again, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=config(2))
    assert engine._prepared is None
    with pytest.raises(ConfigError, match="gradients are sharded at stage 2"), again.no_sync():
        pass
    again.backward(loss_of(again, batch))
    again.step()
    with torch.no_grad():
        engine.train()(batch)  # the weights are the model's
    with pytest.raises(PrepareError, match=r"has been destroyed.*trainer\.model_wrapped = trainer\.model"):
        engine(batch)


def test_the_engine_is_its_model_and_is_let_go_for_another(world):
    world(2).run(_facts)


def _evaluating(ranks: Any) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    engine, optimizer, _, schedule = initialize(model=model, config=config(3))
    assert (optimizer, schedule) == (None, None)
    assert all(p.requires_grad for p in model.parameters())
    sharded = find_sharded(model)
    assert sharded is not None
    assert not sharded.trained()
    with torch.no_grad():
        assert torch.allclose(engine(inputs(1)[0]), reference(inputs(1)[0]), atol=1e-6)
    assert engine.get_global_grad_norm() is None
    with pytest.raises(PrepareError, match="made to evaluate"):
        engine.backward(torch.zeros(()))


def test_an_engine_without_an_optimizer_has_no_masters(world):
    world(2).run(_evaluating)


def _gathering(ranks: Any) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    engine, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=config(3))
    weight = model.blocks[0].up.weight
    assert (weight.ds_shape, weight.ds_numel, weight.ds_status) == (weight.shape, 240, ZeroParamStatus.NOT_AVAILABLE)
    with pytest.raises(ReleasedParameterError):
        weight.sum()
    plain = nn.Parameter(torch.ones(2))
    with GatheredParameters(p for p in [None, weight, weight, plain]), GatheredParameters(weight):
        assert torch.equal(weight, reference.blocks[0].up.weight)
    with GatheredParameters([weight], enabled=False), pytest.raises(ReleasedParameterError):
        weight.sum()
    with GatheredParameters(None), GatheredParameters([plain], modifier_rank=0):
        pass
    for source in range(ranks.world_size):
        with GatheredParameters([weight], modifier_rank=source), torch.no_grad():
            if ranks.rank == source:
                weight.fill_(source + 5)
        with GatheredParameters(weight):
            assert (weight == source + 5).all()
    engine.destroy()
    assert not hasattr(weight, "ds_id")


def test_gathered_parameters_read_and_write(world):
    world(2).run(_gathering)


class Wide(nn.Module):
    """Its constructor writes into its weights, and reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        with torch.no_grad():
            self.up.weight.mul_(0.5)
            self.down.weight[3:9] = 0.25
        self.seen = self.up.weight.abs().sum().item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def _building(ranks: Any) -> None:
    torch.manual_seed(3)
    reference = Wide()
    torch.manual_seed(3)
    with Init(config_dict_or_path=config(3) | {"train_batch_size": "auto"}):
        model = Wide()
    assert model.up.weight.is_meta
    assert model.seen == reference.seen
    with GatheredParameters(model.up.weight):
        assert model.up.weight.sum().item() == reference.up.weight.sum().item()
    with GatheredParameters([model.down.weight, model.up.bias], modifier_rank=0), torch.no_grad():
        if ranks.rank == 0:
            model.down.weight[0:2] = 7.0
    with torch.no_grad():
        reference.down.weight[0:2] = 7.0
    with GatheredParameters(model.down.weight):
        assert model.down.weight[1].tolist() == [7.0] * 128
    engine, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=config(3))
    same(engine, reference, 0.0)
    with Init(config_dict_or_path=config(2)):
        assert not Wide().up.weight.is_meta
    with Init(enabled=False):
        assert not Wide().up.weight.is_meta


def test_a_constructor_inside_init_is_sharded_and_readable(world):
    world(2).run(_building)


def _fragments(ranks: Any, stage: int, offload: str) -> None:
    model = tower()
    engine, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=config(stage, offload=offload))
    weight = model.head.weight
    assert safe_get_full_grad(weight) is None
    engine.backward(loss_of(engine, mine(inputs(1)[0], ranks.rank, ranks.world_size)))
    assert safe_get_full_grad(weight).abs().sum() > 0
    engine.step()
    assert safe_get_full_optimizer_state(weight, "exp_avg").shape == weight.shape
    safe_set_full_fp32_param(weight, torch.full((3, 12), 0.5))
    assert (safe_get_full_fp32_param(weight) == 0.5).all()
    with GatheredParameters(weight):
        assert (weight == 0.5).all()


@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_fragments_are_whole(world, stage, offload):
    world(2).run(_fragments, stage, offload)


def _checkpoints(ranks: Any, folder: str, stage: int) -> None:
    def fresh() -> tuple[Any, Tower]:
        model = tower()
        for parameter in model.first.parameters():
            parameter.requires_grad_(False)
        schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}}
        engine, *_ = initialize(
            model=model,
            optimizer=adamw([p for p in model.parameters() if p.requires_grad]),
            config=config(stage) | {"scheduler": schedule},
        )
        return engine, model

    def step(engine: Any, batch: torch.Tensor) -> float:
        loss = loss_of(engine, mine(batch, ranks.rank, ranks.world_size))
        engine.backward(loss)
        engine.step()
        return loss.item()

    batches = inputs(5)
    engine, _ = fresh()
    assert engine.load_checkpoint(folder) == (None, None)
    for batch in batches[:2]:
        step(engine, batch)
    engine.save_checkpoint(folder, client_state={"epoch": 3, "names": ["a"]})
    kept = weights(engine)
    step(engine, batches[2])
    engine.save_checkpoint(folder, "named", save_latest=False)
    expected = [step(engine, batch) for batch in batches[3:]]
    rates = engine.get_lr()
    assert Path(folder, "latest").read_text() == "global_step2\n"

    engine, _ = fresh()
    path, client = engine.load_checkpoint(folder, "named")
    assert (path, client) == (str(Path(folder, "named")), {})
    assert [step(engine, batch) for batch in batches[3:]] == expected
    assert engine.get_lr() == rates
    path, client = engine.load_checkpoint(folder)
    assert path.endswith("global_step2")
    assert client == {"epoch": 3, "names": ["a"]}
    assert (engine.global_steps, engine.loaded_checkpoint_tag) == (2, "global_step2")

    engine, model = fresh()
    engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert all(torch.equal(kept[name], value) for name, value in weights(engine).items())
    assert safe_get_full_optimizer_state(model.head.weight, "exp_avg") is None
    whole = get_fp32_state_dict_from_zero_checkpoint(folder)
    assert all(torch.equal(whole[name], value) for name, value in kept.items())
    with pytest.raises(CheckpointError, match="nowhere"):
        engine.load_checkpoint(folder, "nowhere")
    if ranks.rank == 0:
        Path(folder, "theirs").mkdir()
        Path(folder, "theirs", "mp_rank_00_model_states.pt").touch()
    ranks.barrier()
    with pytest.raises(CheckpointError, match="was written by DeepSpeed itself"):
        engine.load_checkpoint(folder, "theirs")


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_have_tags_client_state_and_partial_loads(world, stage):
    with tempfile.TemporaryDirectory() as folder:
        world(2).run(_checkpoints, folder, stage)
        # The script that each checkpoint directory has: without ranks, and without the training script.
        script = [sys.executable, f"{folder}/zero_to_fp32.py", folder, f"{folder}/out"]
        subprocess.run([*script, "-t", "named"], check=True, timeout=120)
        whole = torch.load(f"{folder}/out/pytorch_model.bin")
        assert whole.keys() == tower().state_dict().keys()
        assert {value.dtype for value in whole.values()} == {torch.float32}


def _partly(ranks: Any, folder: str, stage: int) -> None:
    def fresh(frozen: str = "first", extra: str | None = None) -> tuple[Any, nn.Module]:
        model = nn.Sequential()
        model.add_module(frozen, nn.Linear(12, 12))
        model.add_module("second", nn.Linear(12, 12))
        if extra is not None:
            model.add_module(extra, nn.Linear(12, 12))
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        model.get_submodule(frozen).requires_grad_(False)
        schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}}
        optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        engine, *_ = initialize(model=model, optimizer=optimizer, config=config(stage) | {"scheduler": schedule})
        return engine, model

    def step(engine: Any) -> None:
        engine.backward(engine(torch.ones(6, 12)).pow(2).mean())
        engine.step()

    engine, _ = fresh()
    for _ in range(3):
        step(engine)
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    kept = weights(engine)

    # Frozen weights of other names: an error that names one, or passed over.
    engine, model = fresh("front")
    before = weights(engine)
    with pytest.raises(CheckpointError, match=r"frozen weight\(s\).*the first is f"):
        engine.load_checkpoint(folder)
    assert all(torch.equal(before[name], value) for name, value in weights(engine).items())
    engine.load_checkpoint(folder, load_module_strict=False)
    found = weights(engine)
    assert torch.equal(found["second.weight"], kept["second.weight"])
    assert torch.equal(found["front.weight"], before["front.weight"])
    assert safe_get_full_optimizer_state(model.second.weight, "exp_avg").abs().sum() > 0
    step(engine)

    # A trained weight that only this model has: its optimizer has another group, so its states are not for it.
    engine, model = fresh("front", "third")
    before = weights(engine)
    with pytest.raises(CheckpointError, match="parameter groups"):
        engine.load_checkpoint(folder, load_module_strict=False)
    _, client = engine.load_checkpoint(folder, load_module_strict=False, load_optimizer_states=False)
    assert client == {"epoch": 3}
    found = weights(engine)
    assert torch.equal(found["second.weight"], kept["second.weight"])
    assert torch.equal(found["third.weight"], before["third.weight"])
    assert (engine.global_steps, engine.lr_scheduler.last_batch_iteration) == (3, 2)
    assert safe_get_full_optimizer_state(model.second.weight, "exp_avg") is None
    step(engine)

    # The weights alone.
    engine, model = fresh()
    step(engine)
    states = safe_get_full_optimizer_state(model.second.weight, "exp_avg")
    engine.load_checkpoint(folder, load_module_only=True)
    assert all(torch.equal(kept[name], value) for name, value in weights(engine).items())
    assert (engine.global_steps, engine.micro_steps, engine.lr_scheduler.last_batch_iteration) == (1, 1, 0)
    assert torch.equal(safe_get_full_optimizer_state(model.second.weight, "exp_avg"), states)
    assert torch.equal(safe_get_full_fp32_param(model.second.weight), kept["second.weight"])
    step(engine)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_is_loaded_in_part(world, stage):
    with tempfile.TemporaryDirectory() as folder:
        world(2).run(_partly, folder, stage)


def _whole(ranks: Any, stage: int) -> None:
    model = tower()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.register_buffer("seen", torch.arange(3.0))
    model.first.requires_grad_(False)
    engine, *_ = initialize(
        model=model,
        optimizer=adamw([p for p in model.parameters() if p.requires_grad]),
        config=config(stage) | {"bf16": {"enabled": True}},
    )
    assert engine.bfloat16_enabled()
    assert not engine.zero_gather_16bit_weights_on_model_save()
    state = engine._zero3_consolidated_16bit_state_dict()
    some = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if ranks.rank:
        assert (state, some) == (None, None)
        return
    assert (
        state.keys() == model.state_dict(keep_vars=True).keys() if stage < 3 else set(state) >= {"seen", "head.weight"}
    )
    assert {value.dtype for name, value in state.items()} == {torch.bfloat16}
    assert "first.weight" not in some
    assert {"seen", "head.weight"} <= set(some)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_whole_state_is_rank_0s_in_the_precision_that_computes(world, stage):
    world(2).run(_whole, stage)


def _compiled(ranks: Any) -> None:
    model = tower()
    reference = copy.deepcopy(model)
    plain = adamw(reference.parameters())
    engine, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=config(3))
    with pytest.raises(ConfigError, match="no_such is not taken"):
        engine.compile(backend="eager", compile_kwargs={"no_such": 1})
    engine.compile(backend="eager")
    assert engine.is_compiled
    for batch in inputs(3):
        for rank in range(ranks.world_size):
            (loss_of(reference, mine(batch, rank, ranks.world_size)) / ranks.world_size).backward()
        plain.step()
        plain.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler, about itself
            engine.backward(loss_of(engine, mine(batch, ranks.rank, ranks.world_size)))
        engine.step()
    same(engine, reference)
    engine.destroy()


def test_an_engine_compiles_the_blocks_of_its_model(world):
    world(2).run(_compiled)


def _half(ranks: Any, stage: int) -> None:
    model = tower()
    settings = config(stage) | {"fp16": {"enabled": True, "initial_scale_power": 40}}
    engine, optimizer, *_ = initialize(model=model, optimizer=adamw(model.parameters()), config=settings)
    before = weights(engine)
    engine.backward(loss_of(engine, inputs(1)[0]).float())
    engine.step()
    assert (optimizer.overflow, engine.skipped_steps) == (True, 1)
    assert all(torch.equal(before[name], value) for name, value in weights(engine).items())
    for _ in range(40):
        engine.backward(loss_of(engine, inputs(1)[0]).float())
        engine.step()
        if not optimizer.overflow:
            break
    assert not optimizer.overflow
    assert optimizer.loss_scale < 2.0**40


@pytest.mark.parametrize("stage", [2, 3])
def test_an_overflow_skips_the_step_and_is_told(world, stage):
    world(2).run(_half, stage)


def _wrong(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="no configuration was given"):
        initialize(model=tower())
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Module"):
        initialize(model=3, config=config(2))
    with pytest.raises(ConfigError, match="sparse_attention: is not supported"):
        initialize(model=tower(), config=config(2) | {"sparse_attention": {"mode": "fixed"}})
    with pytest.raises(NotImplementedError, match="mpu is for model parallelism"):
        initialize(model=tower(), config=config(2), mpu=object())


def test_what_cannot_be_initialized_is_refused(world):
    world(2).run(_wrong)
