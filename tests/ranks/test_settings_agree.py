"""One rank is told something else than the others: one error that names key, ranks and values, or the same numbers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rig import fresh_ranks, torchrun
from shardwise import (
    Accelerator,
    AutocastKwargs,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
)
from shardwise.config.agreement import OWN, keys_of_schema
from shardwise.config.schema import ENVIRONMENT_KEY
from shardwise.errors import ConfigError, PrepareError, ShardwiseError
from shardwise.process import forget_run

Values = dict[str, Any]
BASE: Values = {"distributed_type": "DEEPSPEED", "use_cpu": True, "deepspeed_config": {"zero_stage": 3}}


def merged(one: Values, other: Values) -> Values:
    result = dict(one)
    for key, value in other.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) and value else value
    return result


def at(key: str, value: Any) -> Values:
    """{"a": {"b": value}} for "a.b"."""
    *sections, last = key.split(".")
    values: Values = {last: value}
    for section in reversed(sections):
        values = {section: values}
    return values


TWO_MACHINES = {"num_machines": 2, "num_processes": 2, "main_process_ip": "host", "main_process_port": 1}
FP16 = {"mixed_precision": "fp16"}
COMPILED = at("dynamo_config.dynamo_backend", "eager")
# key -> (what it takes to be set at all, its value on rank 1).
CHANGES: dict[str, tuple[Values, Any]] = {
    "distributed_type": (at("deepspeed_config.zero_stage", 0), "MULTI_CPU"),
    "mixed_precision": ({}, "bf16"),
    "num_processes": ({"num_processes": 2}, 4),
    "num_machines": (TWO_MACHINES, 1),
    "use_cpu": ({}, False),
    "debug": ({}, True),
    "deepspeed_config.zero_stage": ({}, 2),
    "deepspeed_config.gradient_accumulation_steps": ({}, 2),
    "deepspeed_config.gradient_clipping": ({}, 0.1),
    "deepspeed_config.offload_optimizer_device": ({}, "cpu"),
    "deepspeed_config.offload_param_device": ({}, "cpu"),
    "deepspeed_config.zero3_init_flag": ({}, True),
    "deepspeed_config.zero3_save_16bit_model": ({}, True),
    "shardwise_config.reduce_dtype": ({}, "bf16"),
    "shardwise_config.prefetch_units": ({}, 0),
    "shardwise_config.gather_with": ({}, "nccl"),
    "shardwise_config.units": ({}, ["Linear"]),
    "shardwise_config.whole_adapters": ({}, False),
    "shardwise_config.gpu_memory_budget": ({}, "1GB"),
    "shardwise_config.generation_memory_budget": ({}, None),
    "shardwise_config.scheduler_steps_per_process": ({}, False),
    "shardwise_config.collective_timeout_s": ({}, 500),
    "shardwise_config.loss_chunk_tokens": ({}, 8),
    "shardwise_config.loss_keeps_logits": ({}, True),
    "shardwise_config.fast_lora": ({}, True),
    "shardwise_config.activation_checkpointing": ({}, "all"),
    "shardwise_config.max_restarts": ({}, 1),
    "shardwise_config.restart_processes": ({}, 1),
    "shardwise_config.loss_scale.static": (FP16, 8),
    "shardwise_config.loss_scale.initial": (FP16, 8),
    "shardwise_config.loss_scale.growth_interval": (FP16, 5),
    "shardwise_config.loss_scale.minimum": (FP16, 0.5),
    "shardwise_config.train_batch_size": ({}, 8),
    "shardwise_config.micro_batch_size": ({}, 4),
    "dynamo_config.dynamo_backend": ({}, "eager"),
    "dynamo_config.dynamo_mode": (COMPILED, "max-autotune-no-cudagraphs"),
    "dynamo_config.dynamo_use_fullgraph": (COMPILED, True),
    "dynamo_config.dynamo_use_dynamic": (COMPILED, True),
    "dynamo_config.dynamo_use_regional_compilation": (COMPILED, False),
    # A machine's own.
    "machine_rank": (TWO_MACHINES, 1),
    "main_process_ip": ({"main_process_ip": "host"}, "10.0.0.1"),
    "main_process_port": ({}, 1),
    "rdzv_backend": ({}, "c10d"),
    "same_network": ({}, False),
    "main_training_function": ({}, "other"),
    "gpu_ids": ({"use_cpu": False}, "1"),
    "enable_cpu_affinity": ({}, True),
    "deepspeed_config.deepspeed_config_file": ({}, "/elsewhere/ds.json"),
    "deepspeed_config.offload_optimizer_nvme_path": (
        at("deepspeed_config.offload_optimizer_device", "nvme"),
        "DIRECTORY",
    ),
    "deepspeed_config.offload_param_nvme_path": (at("deepspeed_config.offload_param_device", "nvme"), "DIRECTORY"),
    "deepspeed_config.deepspeed_moe_layer_cls_names": ({}, ["Linear"]),
    "deepspeed_config.deepspeed_multinode_launcher": ({}, "pdsh"),
    "shardwise_config.threads_per_rank": ({}, 2),
    **{key: ({}, {}) for key, reason in OWN.items() if reason == "is empty"},
}
# A key with one value, and an older spelling of another key.
UNCHANGEABLE = {"compute_environment", "shardwise_config.loss_scale.hysteresis", "dynamo_backend"}


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(x))


def data(count: int = 16, width: int = 8) -> TensorDataset:
    return TensorDataset(torch.randn(count, width, generator=torch.Generator().manual_seed(1)))


def trained(accelerator: Accelerator) -> str:
    """Two steps; what is left of the weights, as a digest of their bits."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=4))
    for (x,) in loader:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    found = hashlib.sha256()
    with accelerator._models[0].sharded.gathered():
        for parameter in model.parameters():
            found.update(parameter.detach().clone().numpy().tobytes())
    accelerator.free_memory()
    return found.hexdigest()


def _configured(ranks: Any, configurations: list[Values]) -> str:
    forget_run()
    os.environ[ENVIRONMENT_KEY] = json.dumps(configurations[ranks.rank])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # use_cpu: false on a machine that has a GPU
        try:
            return trained(Accelerator())
        except ShardwiseError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            torch.set_num_threads(1)
            del os.environ[ENVIRONMENT_KEY]


def _joined() -> str:
    accelerator = Accelerator()
    try:
        return trained(accelerator)
    finally:
        accelerator.end_training()


def _newly_joined(*configurations: Values) -> list[str | None]:
    environments = torchrun(len(configurations))
    for environment, values in zip(environments, configurations, strict=True):
        environment[ENVIRONMENT_KEY] = json.dumps(values)
    return [outcome.error or outcome.value for outcome in fresh_ranks(_joined, environments)]


def test_the_table_has_every_key():
    assert {*CHANGES, *UNCHANGEABLE} == set(keys_of_schema())


@pytest.fixture(scope="module")
def of_equal_ranks() -> dict[str, list[str]]:
    """What a configuration gives where all ranks have it."""
    return {}


@pytest.mark.parametrize("key", CHANGES)
def test_one_ranks_other_value_is_an_error_on_all_or_changes_nothing(world, key, of_equal_ranks, tmp_path):
    needs, value = CHANGES[key]
    base = merged(BASE, needs)
    if value == "DIRECTORY":
        base, value = merged(base, at(key, str(tmp_path / "one"))), str(tmp_path / "other")
        (tmp_path / "one").mkdir()
        (tmp_path / "other").mkdir()
    changed = merged(base, at(key, value))
    assert changed != base
    # Ranks that have met under one timeout need no other group; these have not met.
    apart = key == "shardwise_config.collective_timeout_s"
    found = _newly_joined(base, changed) if apart else world(2).run(_configured, [base, changed])
    if key in OWN:
        text = json.dumps(base, sort_keys=True)
        if text not in of_equal_ranks:
            of_equal_ranks[text] = world(2).run(_configured, [base, base])
        assert "Error" not in found[0]
        assert found == of_equal_ranks[text]
        return
    assert found[0] == found[1]
    assert found[0].startswith("ConfigError: ranks 0 and 1 ")
    name = key.removeprefix("deepspeed_config.") if key.endswith("accumulation_steps") else key
    assert f"{name} is " in found[0]
    assert "on rank 0 and " in found[0]
    assert "on rank 1" in found[0]


KEYWORDS: dict[str, Values] = {
    "mixed_precision": {"mixed_precision": "bf16"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "GradientAccumulationPlugin.sync_with_dataloader": {
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    },
    "deepspeed_config.zero_stage": {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=1)},
    "dynamo_config.dynamo_backend": {"dynamo_backend": "eager"},
    "shardwise_config.collective_timeout_s": {
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(seconds=9))]
    },
    "GradScalerKwargs.init_scale": {"kwargs_handlers": [GradScalerKwargs(init_scale=2.0)]},
    "AutocastKwargs.enabled": {"kwargs_handlers": [AutocastKwargs(enabled=False)]},
    "DataLoaderConfiguration.split_batches": {"split_batches": True},
    "DataLoaderConfiguration.even_batches": {"dataloader_config": DataLoaderConfiguration(even_batches=False)},
    "Accelerator.rng_types": {"rng_types": ["torch"]},
    "Accelerator.device_placement": {"device_placement": False},
    "Accelerator.step_scheduler_with_optimizer": {"step_scheduler_with_optimizer": False},
}
OWN_KEYWORDS: list[Values] = [
    {"project_config": ProjectConfiguration("elsewhere", total_limit=2)},
    {"kwargs_handlers": [ProfileKwargs(record_shapes=True)]},
    {"dataloader_config": DataLoaderConfiguration(non_blocking=True)},
]


def _given(ranks: Any, keywords: Values) -> str:
    Accelerator(cpu=True)  # the run is joined: a later Accelerator compares as the first does
    try:
        return trained(Accelerator(cpu=True, **(keywords if ranks.rank == 1 else {})))
    except ShardwiseError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("key", KEYWORDS)
def test_one_ranks_other_keyword_is_an_error_on_all(world, key):
    found = world(2).run(_given, KEYWORDS[key])
    assert found[0] == found[1]
    assert re.match(
        rf"ConfigError: ranks 0 and 1 have different settings: .*{key} is .* on rank 0 and .* on rank 1", found[0]
    )


@pytest.mark.parametrize("keywords", OWN_KEYWORDS, ids=lambda keywords: next(iter(keywords)))
def test_what_only_concerns_a_rank_itself_may_differ(world, keywords):
    assert world(2).run(_given, keywords) == world(2).run(_given, {})


@pytest.mark.parametrize("keywords", [{"rng_types": ["nonsense"]}, {"fsdp_plugin": 1}, {"log_with": "wandb"}])
def test_a_rank_that_is_asked_for_nonsense_tells_the_others(world, keywords):
    other, own = world(2).run(_given, keywords)
    assert own.startswith("ConfigError: ")
    assert other == f"RankError: rank 1 failed: {own}"


class Scripted:
    """What a script builds; each method of a test's is one line that reads otherwise on rank 1."""

    def __init__(self, what: str) -> None:
        self.net = Net(width=4 if what == "width" else 8, dropout=0.5 if what == "dropout" else 0.0)
        if what == "frozen":
            self.net.head.bias.requires_grad_(False)
        if what == "dtype":
            self.net.head.to(torch.float64)
        if what == "buffer":
            self.net.register_buffer("seen", torch.zeros(2))
        if what == "tied":
            self.net.blocks[1][0].weight = self.net.blocks[0][0].weight
        decay = [p for p in self.net.parameters() if p.ndim > 1]
        rest = [p for p in self.net.parameters() if p.ndim == 1]
        if what == "group":
            decay.append(rest.pop())
        groups = [{"params": decay, "weight_decay": 0.2 if what == "decay" else 0.1}, {"params": rest}]
        betas = (0.8, 0.99) if what == "betas" else (0.9, 0.99)
        kind = torch.optim.Adam if what == "class" else torch.optim.AdamW
        self.optimizer = kind(groups, lr=0.2 if what == "lr" else 0.1, betas=betas)
        self.scheduler = self._schedule(what)
        count = 12 if what == "length" else 16
        self.loader = DataLoader(data(count), batch_size=3 if what == "batch" else 4)
        self.objects: list[Any] = [self.net, self.optimizer, self.scheduler, self.loader]
        if what == "missing":
            self.objects.pop()
        if what == "order":
            self.objects.reverse()

    def _schedule(self, what: str) -> Any:
        if what == "period":
            return torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        if what.startswith("total"):
            total = 200 if what == "total of rank 1" else 100
            return torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / total))
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 1)


SCRIPTS = {
    "width": "blocks.0.0.weight of Net is (8, 8) float32 trained on rank 0 and (4, 4) float32 trained on rank 1",
    "dropout": "p of drop of Net is 0.0 on rank 0 and 0.5 on rank 1",
    "frozen": "head.bias of Net is (1,) float32 trained on rank 0 and (1,) float32 frozen on rank 1",
    "dtype": "head.weight of Net is (1, 8) float32 trained on rank 0 and (1, 8) float64 trained on rank 1",
    "buffer": "buffer seen of Net is (1,) float32 on rank 0 and (2,) float32 on rank 1",
    "tied": "blocks.1.0.weight of Net is (8, 8) float32 trained on rank 0 and tied to blocks.0.0.weight on rank 1",
    "group": "the group of head.bias in AdamW is 1 on rank 0 and 0 on rank 1",
    "decay": "weight_decay of group 0 of AdamW is 0.1 on rank 0 and 0.2 on rank 1",
    "betas": "betas of group 0 of AdamW is [0.9, 0.99] on rank 0 and [0.8, 0.99] on rank 1",
    "class": 'the list of objects is ["Net", "AdamW", "StepLR", "DataLoader"] on rank 0 and ["Net", "Adam"',
    "lr": "lr of group 0 of AdamW is 0.1 on rank 0 and 0.2 on rank 1",
    "period": "step_size of StepLR is 1 on rank 0 and 2 on rank 1",
    "total": "[100]",
    "length": "the length of DataLoader is 4 batches of a data set of 16 on rank 0 and 3 batches of a data set of 12 on rank 1",
    "batch": "the batch size of DataLoader is 4 on rank 0 and 3 on rank 1",
    "missing": "the list of objects is",
    "order": "the list of objects is",
}


def _scripted(ranks: Any, what: str) -> tuple[str, int]:
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    others = "total" if what == "total" else "nothing"
    script = Scripted(
        f"{what} of rank 1" if what == "total" and ranks.rank == 1 else what if ranks.rank == 1 else others
    )
    ranks.counts.clear()
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(*script.objects)
    moved = sum(ranks.counts.values())
    # Nothing was changed: what is right on all ranks is prepared by the same Accelerator.
    accelerator.prepare(*Scripted(others).objects)
    accelerator.free_memory()
    return str(caught.value), moved


@pytest.mark.parametrize("what", SCRIPTS)
def test_one_ranks_other_object_is_an_error_on_all_before_anything_moves(world, what):
    found = world(2).run(_scripted, what)
    assert found[0] == found[1]
    text, moved = found[0]
    assert text.startswith("`prepare` got different objects on ranks 0 and 1: ")
    assert SCRIPTS[what] in text
    assert moved == 0


def _draws(ranks: Any, kind: str) -> tuple[list[str], int]:
    forget_run()
    accelerator = Accelerator(cpu=True)
    own = torch.Generator().manual_seed(ranks.rank)
    whole = data()
    sets: dict[str, Any] = {
        "tensors": TensorDataset(torch.randn(16, 8, generator=own)),
        "split": torch.utils.data.random_split(whole, [12, 4], generator=own)[0],
        "items": [ranks.rank] * 16,
        "same": torch.utils.data.random_split(whole, [12, 4], generator=torch.Generator().manual_seed(3))[0],
        "drawn": [whole, ranks.rank],  # of other items nothing is known
    }
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardwise").addHandler(handler)
    try:
        loader = accelerator.prepare(DataLoader(sets[kind], batch_size=2))
    finally:
        logging.getLogger("shardwise").removeHandler(handler)
    return said, len(loader)


@pytest.mark.parametrize(("kind", "warned"), [("tensors", 1), ("split", 1), ("items", 1), ("same", 0), ("drawn", 0)])
def test_ranks_that_drew_data_of_their_own_are_told_once(world, kind, warned):
    (first, _), (other, _) = world(2).run(_draws, kind)
    assert len(first) == warned
    assert not other
    assert all("the contents of the data set of DataLoader is " in text and "on rank 1" in text for text in first)


def _changed_between(ranks: Any) -> str:
    forget_run()
    accelerator = Accelerator(cpu=True)
    if ranks.rank == 1:
        accelerator.gradient_accumulation_steps = 4
        accelerator.even_batches = False
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(DataLoader(data(), batch_size=4))
    return str(caught.value)


def test_settings_that_a_script_changes_are_compared_in_prepare(world):
    found = world(2).run(_changed_between)
    assert found[0] == found[1]
    assert "gradient_accumulation_steps is 1 on rank 0 and 4 on rank 1" in found[0]
    assert "DataLoaderConfiguration.even_batches is true on rank 0 and false on rank 1" in found[0]


def _differing_in(ranks: Any, what: str) -> str:
    forget_run()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.head.weight.detach().clone()
    accelerator.backward(model(torch.ones(2, 8)).square().mean())
    if what == "lr":
        optimizer.param_groups[0]["lr"] = 0.1 + ranks.rank
    elif what == "norm_type":
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=2.0 + ranks.rank)
    else:
        getattr(accelerator, what)(model.parameters(), 0.5 + ranks.rank)
    with pytest.raises(ConfigError) as caught:
        optimizer.step()
    assert torch.equal(before, model.head.weight)
    accelerator.free_memory()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lr", "the sum of the groups' learning rates is 0.1 on rank 0 and 1.1 on rank 1"),
        ("norm_type", "norm_type of clip_grad_norm_ is 2 on rank 0 and 3 on rank 1"),
        ("clip_grad_norm_", "max_norm of clip_grad_norm_ is 0.5 on rank 0 and 1.5 on rank 1"),
        ("clip_grad_value_", "clip_value of clip_grad_value_ is 0.5 on rank 0 and 1.5 on rank 1"),
    ],
)
def test_ranks_that_would_step_differently_do_not_step(world, what, words):
    found = world(2).run(_differing_in, what)
    assert found[0] == found[1]
    assert words in found[0]
