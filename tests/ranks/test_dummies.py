"""A DummyOptim and a DummyScheduler train as what the DeepSpeed configuration describes, written out in plain torch."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.errors import OptimizerError, PrepareError, ShardwiseError
from shardwise.run.deepspeed_plugins import select_plugin
from shardwise.run.dummies import DummyOptim, DummyScheduler
from shardwise.run.process import forget_run

STEPS, WARMUP, RATE = 6, 2, 0.01
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": 1e-4, "torch_adam": True}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
}


def described(stage, **sections):
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        **sections,
    }


def tower():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def data(world_size):
    torch.manual_seed(4)
    x = torch.randn(2 * STEPS * world_size, 8)
    return TensorDataset(x, x.sum(1, keepdim=True))


def groups_of(model):
    weights, biases = ([p for p in model.parameters() if (p.dim() > 1) is large] for large in (True, False))
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


def in_plain_torch(world_size, micro_steps):
    """Losses, rates and weights of one process that has the whole batches."""
    model = tower()
    optimizer = torch.optim.AdamW(groups_of(model), lr=RATE, eps=1e-4)
    rates, losses = [], []
    total = math.ceil(STEPS * world_size / world_size)
    batches = list(DataLoader(data(world_size), batch_size=2 * world_size))
    for step in range(STEPS // micro_steps):
        i = step - 1
        if i < 0:
            share = 0.0
        elif i < WARMUP:
            share = math.log(i + 1) / math.log(WARMUP)
        else:
            share = max(0.0, (total - i) / (total - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        rates.append(RATE * share)
        for x, y in batches[step * micro_steps : (step + 1) * micro_steps]:
            loss = (model(x) - y).square().mean()
            (loss / micro_steps).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, rates, {name: value.clone() for name, value in model.state_dict().items()}


def accelerator_of(configuration, micro_steps=1):
    forget_run()
    plugin = DeepSpeedPlugin(hf_ds_config=configuration)
    return Accelerator(cpu=True, gradient_accumulation_steps=micro_steps, deepspeed_plugin=plugin)


def prepared(accelerator):
    """As accelerate's example with a configuration does: real objects only where the configuration has no section."""
    model = tower()
    loader = DataLoader(data(accelerator.num_processes), batch_size=2)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    optimizer = (DummyOptim if "optimizer" in config else torch.optim.AdamW)(groups_of(model), lr=RATE)
    assert "scheduler" in config
    scheduler = DummyScheduler(optimizer, total_num_steps=len(loader), warmup_num_steps=WARMUP)
    return accelerator.prepare(model, optimizer, loader, scheduler)


def trained(accelerator, micro_steps=1, folder=None):
    model, optimizer, loader, scheduler = prepared(accelerator)
    rates, losses = [], []
    for number, (x, y) in enumerate(loader):
        with accelerator.accumulate(model):
            if accelerator.sync_gradients:
                rates.append(optimizer.param_groups[0]["lr"])
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if folder is not None and number == STEPS // 2 - 1:
            accelerator.save_state(folder)
    return (losses, rates, accelerator.get_state_dict(model)), scheduler


def _same(ranks, stage, micro_steps):
    accelerator = accelerator_of(described(stage, optimizer=OPTIMIZER, scheduler=SCHEDULER), micro_steps)
    (losses, rates, weights), _ = trained(accelerator, micro_steps)
    wanted = in_plain_torch(ranks.world_size, micro_steps)
    torch.testing.assert_close(losses, wanted[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rates, wanted[1], rtol=1e-12, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(value, wanted[2][name], rtol=0, atol=1e-6)
    config = accelerator.deepspeed_plugin.deepspeed_config
    found = (
        config["train_micro_batch_size_per_gpu"],
        config["train_batch_size"],
        config["gradient_accumulation_steps"],
    )
    assert found == (2, 2 * ranks.world_size * micro_steps, micro_steps)
    assert config["optimizer"]["params"]["lr"] == RATE
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": RATE,
        "warmup_num_steps": WARMUP,
        "total_num_steps": STEPS,
    }
    accelerator.free_memory()


@pytest.mark.parametrize(("stage", "micro_steps"), [(2, 1), (3, 1), (3, 2)])
def test_dummies_train_as_the_same_optimizer_and_schedule_in_plain_torch(world, stage, micro_steps):
    world(2).run(_same, stage, micro_steps)


def _resumed(ranks, folder):
    configuration = described(3, optimizer=OPTIMIZER, scheduler=SCHEDULER)
    (losses, rates, weights), whole = trained(accelerator_of(configuration), folder=folder)
    accelerator = accelerator_of(configuration)
    model, optimizer, loader, scheduler = prepared(accelerator)
    accelerator.load_state(folder)
    again, rates_again = [], []
    for x, y in loader:
        rates_again.append(optimizer.param_groups[0]["lr"])
        loss = (model(x) - y).square().mean()
        accelerator.backward(loss)
        again.append(accelerator.reduce(loss.detach(), "mean").item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert (again, rates_again) == (losses[STEPS // 2 :], rates[STEPS // 2 :])
    assert scheduler.state_dict() == whole.state_dict()
    assert type(pickle.loads(pickle.dumps(scheduler))).__name__ == "WarmupDecayLR"
    for name, value in accelerator.get_state_dict(model).items():
        assert torch.equal(value, weights[name])


def test_what_dummies_stand_for_is_saved_and_goes_on(world, tmp_path):
    world(2).run(_resumed, str(tmp_path / "checkpoint"))


def _function(ranks):
    accelerator = accelerator_of(described(2, optimizer=OPTIMIZER))
    model = tower()
    dummy = DummyOptim(model.parameters(), lr=RATE, weight_decay=0.1)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    model, optimizer, scheduler = accelerator.prepare(
        model, dummy, DummyScheduler(dummy, lr_scheduler_callable=schedule)
    )
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(RATE / (step + 1))
        accelerator.backward(model(torch.ones(2, 8)).sum())
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_function_makes_the_schedule_which_steps_once_on_any_number_of_ranks(world):
    world(2).run(_function)


def _refused(ranks, sections, objects, kind, text):
    accelerator = accelerator_of(described(2, **sections))
    model = tower()
    own = torch.optim.AdamW(model.parameters(), lr=RATE)
    dummy = DummyOptim(model.parameters(), lr=RATE)
    known = {
        "own": own,
        "dummy": dummy,
        "schedule": torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1.0),
        "dummy schedule": DummyScheduler(own),
        "dummy schedule of dummy": DummyScheduler(dummy),
    }
    with pytest.raises(kind, match=text):
        accelerator.prepare(model, *(known[name] for name in objects))


@pytest.mark.parametrize(
    ("sections", "objects", "kind", "text"),
    [
        ({"optimizer": OPTIMIZER}, ["own"], OptimizerError, "has an optimizer section"),
        ({}, ["dummy"], OptimizerError, "there is none"),
        ({"scheduler": SCHEDULER}, ["own", "schedule"], PrepareError, "has a scheduler section"),
        ({}, ["own", "dummy schedule"], PrepareError, "there is none"),
        ({"optimizer": OPTIMIZER}, ["dummy", "schedule"], PrepareError, "Give a DummyScheduler"),
        (
            {"optimizer": OPTIMIZER, "scheduler": SCHEDULER},
            ["dummy", "dummy schedule of dummy"],
            ValueError,
            "total_num_steps",
        ),
        ({"optimizer": {"type": "Lamb", "params": {}}}, ["dummy"], ValueError, "cannot work on shards"),
        ({"optimizer": {"type": "AdamX", "params": {}}}, ["dummy"], ValueError, "is unknown"),
    ],
)
def test_a_section_and_a_script_that_do_not_fit_are_told_on_every_rank(world, sections, objects, kind, text):
    world(2).run(_refused, sections, objects, kind, text)


def _written(ranks, key, value, text):
    accelerator = accelerator_of(described(2))
    if ranks.rank == 1:
        accelerator.state.deepspeed_plugin.deepspeed_config[key] = value
    model = tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with pytest.raises(ShardwiseError, match=text):
        accelerator.prepare(model, optimizer)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("gradient_clipping", 2.0, "gradient_clipping is 1.0 on rank 0 and 2.0 on rank 1"),
        ("zero_optimization", {"stage": 3}, "zero_stage is 2 on rank 0 and 3 on rank 1"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps is 1 on rank 0 and 2 on rank 1"),
        ("no_such_key", 1, "no_such_key: unknown key"),
    ],
)
def test_what_one_rank_writes_into_its_plugin_is_an_error_on_all(world, key, value, text):
    world(2).run(_written, key, value, text)


def _two_plugins(ranks, folder):
    forget_run()
    plugins = {
        "student": DeepSpeedPlugin(hf_ds_config=described(2, optimizer=OPTIMIZER)),
        "teacher": DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=1),
    }
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugins)
    student, teacher = tower(), tower()
    select_plugin(accelerator.deepspeed_plugins, "teacher")
    teacher = accelerator.prepare(teacher)
    select_plugin(accelerator.deepspeed_plugins, "student")
    student, optimizer = accelerator.prepare(student, DummyOptim(student.parameters(), lr=RATE))
    stages = [entry.sharded.plan.parameter.sharded for entry in accelerator._run.models]
    assert stages == [True, False]
    x = torch.ones(2, 8) * (ranks.rank + 1)
    losses = []
    for _ in range(3):
        with torch.no_grad():
            target = teacher(x)
        loss = (student(x) - target - 1).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    weights = accelerator.get_state_dict(teacher)
    if ranks.rank == 0:
        assert all(torch.equal(value, weights[name]) for name, value in tower().state_dict().items())


def test_a_frozen_teacher_has_a_plugin_of_its_own(world, tmp_path):
    world(2).run(_two_plugins, str(tmp_path / "checkpoint"))


TEMPLATES = {
    "adam flags": {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True},
    },
    "plain": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
}


def _template(ranks, stage, optimizer, offload):
    configuration = described(stage, optimizer=optimizer, scheduler=SCHEDULER)
    configuration["fp16"] = {
        **{"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        **{"hysteresis": 2, "min_loss_scale": 1},
    }
    configuration |= {"gradient_accumulation_steps": 1, "gradient_clipping": "auto", "steps_per_print": 2000}
    configuration["zero_optimization"] |= {name: {"device": "cpu", "pin_memory": True} for name in offload}
    before = copy.deepcopy(configuration)
    accelerator = accelerator_of(configuration)
    assert accelerator.mixed_precision == "fp16"
    model, optimizer, loader, _ = prepared(accelerator)
    x, y = next(iter(loader))
    accelerator.backward((model(x) - y).square().mean())
    optimizer.step()
    assert configuration == before, "a dictionary of the script's is left as it is"
    accelerator.free_memory()


@pytest.mark.parametrize(
    ("stage", "optimizer", "offload"),
    [
        (1, "adam flags", ()),
        (2, "adam flags", ()),
        (2, "adam flags", ("offload_optimizer",)),
        (3, "plain", ()),
        (3, "plain", ("offload_optimizer", "offload_param")),
    ],
)
def test_accelerates_templates_train_with_dummies(world, stage, optimizer, offload):
    world(2).run(_template, stage, TEMPLATES[optimizer], offload)


def test_accelerates_own_classes_of_these_names_are_taken_too():
    theirs = pytest.importorskip("accelerate.utils.deepspeed")
    forget_run()
    accelerator = accelerator_of(described(2, optimizer=OPTIMIZER, scheduler=SCHEDULER))
    model = tower()
    dummy = theirs.DummyOptim(model.parameters(), lr=RATE)
    scheduler = theirs.DummyScheduler(dummy, total_num_steps=10, warmup_num_steps=2)
    model, optimizer, scheduler = accelerator.prepare(model, dummy, scheduler)
    assert isinstance(optimizer, torch.optim.Adam)
    assert type(scheduler).__name__ == "WarmupDecayLR"


def test_the_guides_file_is_resolved(tmp_path):
    from shardwise.config.resolve import resolve

    path = Path(tmp_path) / "ds.json"
    path.write_text(json.dumps(described(1, optimizer=OPTIMIZER, scheduler=SCHEDULER)))
    (Path(tmp_path) / "run.yaml").write_text(
        "distributed_type: DEEPSPEED\nuse_cpu: true\nnum_processes: 2\n"
        "deepspeed_config:\n  deepspeed_config_file: ds.json\n  zero3_init_flag: false\n"
    )
    config = resolve({}, Path(tmp_path) / "run.yaml").config
    assert config.engine.optimizer == OPTIMIZER
    assert config.engine.scheduler == SCHEDULER
