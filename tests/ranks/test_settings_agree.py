"""One rank is told something else than the others: one error that names key, ranks and values, or the same numbers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from rig import fresh_ranks, torchrun
from rig.agreeing import Net, data
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
from shardwise.errors import ShardwiseError
from shardwise.run.process import forget_run

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
    "deepspeed_config.shard_group": ({}, 1),
    "deepspeed_config.optimizer_shard_group": ({}, "world"),
    "deepspeed_config.gradient_accumulation_steps": ({}, 2),
    "deepspeed_config.gradient_clipping": ({}, 0.1),
    "deepspeed_config.offload_optimizer_device": ({}, "cpu"),
    "deepspeed_config.offload_param_device": ({}, "cpu"),
    "deepspeed_config.zero3_init_flag": ({}, True),
    "deepspeed_config.zero3_save_16bit_model": ({}, True),
    "shardwise_config.reduce_dtype": ({}, "bf16"),
    "shardwise_config.prefetch_units": ({}, 0),
    "shardwise_config.gather_with": ({}, "nccl"),
    "shardwise_config.gather_dtype": ({}, "int8"),
    "shardwise_config.optimizer_state_dtype": (at("deepspeed_config.offload_optimizer_device", "cpu"), "bf16"),
    "shardwise_config.offload_param_source": ({}, "model_files"),
    "shardwise_config.units": ({}, ["Linear"]),
    "shardwise_config.whole_adapters": ({}, False),
    "shardwise_config.gpu_memory_budget": ({}, "1GB"),
    "shardwise_config.generation_memory_budget": ({}, None),
    "shardwise_config.scheduler_steps_per_process": ({}, False),
    "shardwise_config.collective_timeout_s": ({}, 500),
    "shardwise_config.wait_warning_s": ({}, 5),
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
    "shardwise_config.optimizer": ({}, {"type": "AdamW", "params": {"lr": 0.1}}),
    "shardwise_config.scheduler": ({}, {"type": "WarmupLR", "params": {}}),
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
    with accelerator._run.models[0].sharded.gathered():
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


@pytest.mark.parametrize("keywords", [{"rng_types": ["nonsense"]}, {"fsdp_plugin": 1}, {"log_with": "nonsense"}])
def test_a_rank_that_is_asked_for_nonsense_tells_the_others(world, keywords):
    other, own = world(2).run(_given, keywords)
    assert own.startswith("ConfigError: ")
    assert other == f"RankError: rank 1 failed: {own}"
