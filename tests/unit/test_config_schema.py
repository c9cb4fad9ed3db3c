"""The schema promises: every key of the guide is known, every wrong value is told, all of them at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardwise.config.check import check, checked, from_environment, merged
from shardwise.config.rules import notes
from shardwise.config.schema import ENVIRONMENT_KEY, Config, EngineConfig, LossScaleConfig, ZeroConfig
from shardwise.errors import ConfigError

GUIDE = {
    "compute_environment": "LOCAL_MACHINE",
    "deepspeed_config": {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "cpu",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "zero_stage": 3,
    },
    "distributed_type": "DEEPSPEED",
    "downcast_bf16": "no",
    "dynamo_backend": "NO",
    "fsdp_config": {},
    "machine_rank": 0,
    "main_training_function": "main",
    "megatron_lm_config": {},
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": False,
}


def zero(**settings: object) -> dict[str, object]:
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": settings}


def test_the_guides_file_is_taken_as_it_is() -> None:
    config = checked(GUIDE)
    assert config.zero.zero_stage == 3
    assert config.zero.offload_optimizer_device == config.zero.offload_param_device == "cpu"
    assert config.zero.gradient_clipping == 1.0
    assert config.mixed_precision == "no"
    assert config.num_processes == 1


def test_zero3_init_flag_needs_a_note_below_stage_3_only() -> None:
    assert checked(GUIDE).zero.zero3_init_flag
    assert notes(checked(GUIDE)) == []
    (note,) = notes(checked(zero(zero_stage=2, zero3_init_flag=True)))
    assert "no effect at zero_stage 2" in note


@pytest.mark.parametrize(
    ("values", "key", "text"),
    [
        (zero(zero_stage=5), "deepspeed_config.zero_stage", "5 is not one of 0, 1, 2, 3"),
        (zero(zero_stage="two"), "deepspeed_config.zero_stage", "'two' is not one of"),
        (zero(zero_stage=True), "deepspeed_config.zero_stage", "True is not one of"),
        (zero(zero_stge=3), "deepspeed_config.zero_stge", "unknown key; did you mean zero_stage?"),
        (zero(zero_stage=2, offload_param_device="cpu"), "deepspeed_config.offload_param_device", "needs zero_stage 3"),
        (zero(zero_stage=0, offload_optimizer_device="cpu"), "deepspeed_config.offload_optimizer_device", "needs zero"),
        (zero(offload_optimizer_device="nvme"), "deepspeed_config.offload_optimizer_nvme_path", "is needed"),
        (
            {"shardwise_config": {"activation_checkpointing": "some"}},
            "shardwise_config.activation_checkpointing",
            "auto",
        ),
        ({"shardwise_config": {"gpu_memory_budget": "much"}}, "shardwise_config.gpu_memory_budget", "24GB"),
        (zero(offload_optimizer_device="gpu"), "deepspeed_config.offload_optimizer_device", "'gpu' is not one of"),
        (zero(gradient_clipping=-1), "deepspeed_config.gradient_clipping", "out of range"),
        (zero(gradient_clipping="nan"), "deepspeed_config.gradient_clipping", "not a number"),
        (zero(gradient_accumulation_steps=0), "deepspeed_config.gradient_accumulation_steps", "1 or more"),
        (zero(gradient_accumulation_steps=1.5), "deepspeed_config.gradient_accumulation_steps", "not a whole number"),
        (zero(deepspeed_hostfile="hosts"), "deepspeed_config.deepspeed_hostfile", "--hostfile"),
        ({"num_processes": "eight"}, "num_processes", "'eight' is not a whole number"),
        ({"num_processes": True}, "num_processes", "not a whole number"),
        ({"learning_rate": 1}, "learning_rate", "unknown key"),
        ({"zero_stage": 3}, "zero_stage", "belongs into deepspeed_config"),
        ({"mixed_precision": "bf17"}, "mixed_precision", "'bf17' is not one of no, fp16, bf16"),
        ({"mixed_precision": "fp8"}, "mixed_precision", "fp8 is not supported"),
        ({"distributed_type": "FSDP"}, "distributed_type", "FSDP is not what shardwise runs"),
        ({"distributed_type": "DEEP_SPEED"}, "distributed_type", "is not one of NO, MULTI_CPU"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment", "not supported"),
        ({"fsdp_config": {"fsdp_version": 2}}, "fsdp_config", "FSDP"),
        ({"dynamo_backend": "TENSORRT"}, "dynamo_backend", "is not one of no, inductor"),
        ({"dynamo_config": {"dynamo_backend": "IPEX"}}, "dynamo_config.dynamo_backend", "is not one of no, inductor"),
        ({"enable_cpu_affinity": "two"}, "enable_cpu_affinity", "two"),
        ({"downcast_bf16": True}, "downcast_bf16", "TPU"),
        ({"tpu_name": "v4"}, "tpu_name", "TPU"),
        ({"use_cpu": "maybe"}, "use_cpu", "not true or false"),
        ({"deepspeed_config": 3}, "deepspeed_config", "not a section"),
        ({"distributed_type": "MULTI_GPU", "deepspeed_config": {"zero_stage": 3}}, "deepspeed_config", "has no ZeRO"),
        ({"distributed_type": "NO", "num_processes": 2}, "num_processes", "contradicts distributed_type NO"),
        ({"distributed_type": "MULTI_GPU", "use_cpu": True}, "use_cpu", "contradicts"),
        ({"machine_rank": 1}, "machine_rank", "not below num_machines 1"),
        ({"use_cpu": True, "gpu_ids": "0"}, "gpu_ids", "contradicts"),
        ({"gpu_ids": "0,0"}, "gpu_ids", "different numbers"),
        (zero(shard_group="rack"), "deepspeed_config.shard_group", "not world, machine or a number of ranks"),
        (zero(shard_group=0), "deepspeed_config.shard_group", "0 is not world, machine or a number of ranks"),
        (
            zero(shard_group=3) | {"num_processes": 8},
            "deepspeed_config.shard_group",
            "3 does not divide the 8 processes",
        ),
        ({"shardwise_config": {"prefetch_units": -1}}, "shardwise_config.prefetch_units", "0 or more"),
        ({"shardwise_config": {"reduce_dtype": "fp64"}}, "shardwise_config.reduce_dtype", "not one of"),
        ({"shardwise_config": {"loss_scale": {"initial": 8}}}, "shardwise_config.loss_scale", "fp16 only"),
        ({"shardwise_config": {"prefetch": 1}}, "shardwise_config.prefetch", "did you mean prefetch_units?"),
    ],
)
def test_a_wrong_value_is_told_by_its_key(values: dict[str, object], key: str, text: str) -> None:
    config, problems = check(values)
    assert config is None
    assert [".".join(problem.key) for problem in problems] == [key]
    assert text in problems[0].text
    assert "\n" not in problems[0].text


def test_a_shard_group_is_read_from_words_and_numbers_and_named_where_nothing_is_sharded() -> None:
    for said, meant in (("World", "world"), (" machine", "machine"), ("2", 2), (4, 4)):
        assert checked(zero(zero_stage=3, shard_group=said)).zero.shard_group == meant
    assert notes(checked(zero(zero_stage=0, shard_group=2))) == [
        "shard_group: has no effect at zero_stage 0: nothing is sharded."
    ]
    assert notes(checked(zero(zero_stage=1, shard_group=2))) == []


def test_who_divides_states_is_named_where_it_has_no_effect_and_refused_where_weights_are_whole() -> None:
    def said(**section: Any) -> list[str]:
        return notes(checked(zero(optimizer_shard_group="world", **section)))

    assert said(zero_stage=3, shard_group=2) == []
    assert said(zero_stage=3) == [
        "optimizer_shard_group: has no effect: shard_group is world, so all ranks divide everything."
    ]
    assert "optimizer_shard_group: has no effect: nothing is sharded." in said(zero_stage=0)
    with pytest.raises(
        ConfigError, match="at zero_stage 2 these are whole on every rank; take shard_group: world, which"
    ):
        said(zero_stage=2, shard_group="machine")


def test_compressed_gathers_without_effect_are_named_where_the_file_alone_tells() -> None:
    def said(processes: int | None = None, machines: int = 2, **zero_config: object) -> list[str]:
        values = zero(**{"zero_stage": 3, **zero_config})
        values |= {"num_machines": machines, "shardwise_config": {"gather_dtype": "int8"}}
        values |= {"main_process_ip": "a", "main_process_port": 1} if machines > 1 else {}
        return notes(checked(values | ({} if processes is None else {"num_processes": processes})))

    assert said() == said(16) == said(16, shard_group=16) == said(16, shard_group=4, machines=8) == []
    assert said(machines=1) == ["gather_dtype: has no effect on one machine, where weights are gathered exactly."]
    assert said(zero_stage=2) == ["gather_dtype: has no effect at zero_stage 2: passes gather no weights."]
    for group in ("machine", 4):
        text = f"gather_dtype: has no effect with shard_group {group}: gathers stay on one machine."
        assert said(16, shard_group=group) == [text]
    assert checked(zero()).engine.gather_dtype == "none"


def test_a_format_of_states_without_effect_is_named_where_the_file_alone_tells() -> None:
    def said(device: str, dtype: str = "int8", **values: object) -> list[str]:
        found = zero(zero_stage=2, offload_optimizer_device=device) | {
            "shardwise_config": {"optimizer_state_dtype": dtype}
        }
        if device == "nvme":
            found["deepspeed_config"]["offload_optimizer_nvme_path"] = "/mnt"
        return notes(checked(found | values))

    assert said("cpu", use_cpu=False) == said("nvme", use_cpu=False) == said("nvme", use_cpu=True) == []
    assert said("none") == ["optimizer_state_dtype: has no effect: nothing of the optimizer is offloaded."]
    (text,) = said("cpu", use_cpu=True)
    assert text.startswith(
        "optimizer_state_dtype: has no effect: a run on CPUs steps what rests on cpu in place, in fp32; "
    )
    assert said("none", "fp32") == said("cpu", "fp32", use_cpu=True) == []
    assert checked(zero()).engine.optimizer_state_dtype == "fp32"


def test_machines_must_fit_together() -> None:
    _, problems = check({"num_machines": 2, "num_processes": 3, "distributed_type": "MULTI_GPU"})
    assert {problem.key[0] for problem in problems} == {"num_processes", "main_process_ip", "main_process_port"}


def test_every_problem_is_told_at_once() -> None:
    values = zero(zero_stage=5, gradient_clipping="x", offload_param_device="cpu", zer=1) | {"num_processes": "x"}
    with pytest.raises(ConfigError) as error:
        checked(values)
    lines = str(error.value).splitlines()
    # offload_param_device is right by itself, and the rule about it cannot be judged while the stage is wrong.
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"mixed_precision": False}, "mixed_precision", "no"),
        ({"mixed_precision": "BF16"}, "mixed_precision", "bf16"),
        ({"mixed_precision": None}, "mixed_precision", "no"),
        ({"fp16": True}, "mixed_precision", "fp16"),
        ({"fp16": False}, "mixed_precision", "no"),
        ({"num_processes": "2", "distributed_type": "MULTI_GPU"}, "num_processes", 2),
        ({"num_processes": -1}, "num_processes", None),
        ({"use_cpu": "true"}, "use_cpu", True),
        ({"distributed_type": False}, "distributed_type", "NO"),
    ],
)
def test_yaml_spellings_are_understood(values: dict[str, object], key: str, expected: object) -> None:
    assert getattr(checked(values), key) == expected


@pytest.mark.parametrize("spelling", [None, "none", "auto", 0, 0.0, "no", False])
def test_no_clipping_means_none(spelling: object) -> None:
    assert checked(zero(zero_stage=2, gradient_clipping=spelling)).zero.gradient_clipping is None
    assert ZeroConfig().gradient_clipping is None


def test_the_default_is_one_process_without_sharding() -> None:
    config = Config()
    assert config.zero.zero_stage == 0
    assert config.gradient_accumulation_steps == 1
    assert config.engine == EngineConfig()
    assert from_environment({}) == config


def test_a_worker_finds_the_launchers_config() -> None:
    values = {**GUIDE, "shardwise_config": {"units": "Block, Other", "whole_adapters": "false", "reduce_dtype": "auto"}}
    config = checked(values)
    assert config.engine.units == ["Block", "Other"]
    assert config.engine.whole_adapters is False
    assert config.engine.reduce_dtype == "fp32"
    assert from_environment(config.to_environment()) == config
    default_stage = checked({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}})
    assert from_environment(default_stage.to_environment()) == default_stage


def test_debug_makes_torch_compare_collectives() -> None:
    assert Config(debug=True).to_environment()["TORCH_DISTRIBUTED_DEBUG"] == "DETAIL"
    assert "TORCH_DISTRIBUTED_DEBUG" not in Config().to_environment()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"zero": 1})])
def test_a_broken_variable_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=ENVIRONMENT_KEY):
        from_environment({ENVIRONMENT_KEY: text})


def test_keywords_of_the_accelerator_win() -> None:
    config = merged(checked(GUIDE), mixed_precision="bf16", cpu=True, zero_stage=None, units=["Block"])
    assert (config.mixed_precision, config.use_cpu, config.zero.zero_stage) == ("bf16", True, 3)
    assert config.engine.units == ["Block"]
    assert merged(Config(), zero_stage=3).distributed_type == "DEEPSPEED"


def test_accumulation_of_the_file_wins_and_says_so_once() -> None:
    said: list[str] = []
    config = merged(checked(GUIDE), gradient_accumulation_steps=4, on_note=said.append)
    assert config.gradient_accumulation_steps == 1
    assert len(said) == 1
    assert merged(checked(GUIDE), gradient_accumulation_steps=1, on_note=said.append) == config
    assert len(said) == 1


def test_accumulation_of_the_script_counts_where_the_file_is_silent() -> None:
    config = merged(Config(), gradient_accumulation_steps=4)
    assert config.gradient_accumulation_steps == 4
    assert config.distributed_type == "NO"
    silent = checked(zero(zero_stage=3, gradient_accumulation_steps="auto"))
    assert merged(silent, gradient_accumulation_steps=4).gradient_accumulation_steps == 4


def test_a_wrong_keyword_is_told_as_the_accelerators() -> None:
    with pytest.raises(ConfigError, match=r"Accelerator: mixed_precision: 'x' is not one of"):
        merged(Config(), mixed_precision="x")
    with pytest.raises(ConfigError, match="mixed_precison: unknown key; did you mean mixed_precision"):
        merged(Config(), mixed_precison="bf16")


def test_batch_sizes_are_held_against_the_loader() -> None:
    config = checked(zero(zero_stage=2) | {"shardwise_config": {"micro_batch_size": 4, "train_batch_size": 8}})
    config.check_batch_sizes(4, world_size=2)
    with pytest.raises(ConfigError, match="batches of 3"):
        config.check_batch_sizes(3, world_size=2)
    with pytest.raises(ConfigError, match="is 12"):
        config.check_batch_sizes(4, world_size=3)


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.use_cpu = True
    assert LossScaleConfig() == EngineConfig().loss_scale
