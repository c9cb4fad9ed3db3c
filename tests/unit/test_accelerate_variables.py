"""What accelerate's launcher says in ACCELERATE_* variables is in force, is refused, or is told to have no effect."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.config.accelerate_variables import PREFIXES, VARIABLES, configuration, read_variables, variable_of
from shardwise.config.schema import key_of
from shardwise.errors import ConfigError
from shardwise.front.settings import _SAID
from shardwise.run.logging import get_logger
from shardwise.run.process import forget_run

# What `accelerate launch` writes into every process whatever its configuration says, of a run on the CPU and one on GPUs.
ALWAYS = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}
ZERO = {
    **ALWAYS,
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_CONFIG_DS_FIELDS": "gradient_accumulation_steps,gradient_clipping,zero3_init_flag,zero_stage",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "SHARDWISE_CONFIG")):
            monkeypatch.delenv(name)
    forget_run()
    _SAID.clear()
    yield
    forget_run()


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_every_variable_that_accelerate_names_has_a_row():
    accelerate = pytest.importorskip("accelerate")
    named = set()
    for path in Path(accelerate.__file__).parent.rglob("*.py"):
        if "test_utils" not in path.parts:
            named |= set(re.findall(r"ACCELERATE_[A-Z0-9_]+", path.read_text(encoding="utf-8")))
    beginnings = {name for name in named if name.endswith("_")}
    assert {name for name in named - beginnings if variable_of(name) is None} == set()
    assert all(any(row.startswith(name) for row in VARIABLES) for name in beginnings)


def test_every_row_that_acts_is_of_a_setting():
    for name, row in VARIABLES.items():
        if row.kind == "acts":
            assert row.key[0] == "dynamo_config" or key_of(row.key[-1]) == row.key, name
        else:
            assert row.text, name
    assert PREFIXES == ("ACCELERATE_FP8_",)


def test_what_the_launcher_always_says_is_no_setting(monkeypatch, caplog):
    set_all(monkeypatch, ALWAYS)
    accelerator = Accelerator()
    assert accelerator.deepspeed_plugin is None
    assert accelerator.mixed_precision == "no"
    assert accelerator.device.type == "cpu"
    assert not caplog.records


def test_a_zero_run_of_accelerates_launcher_is_one_here(monkeypatch, caplog):
    set_all(monkeypatch, ZERO)
    accelerator = Accelerator()
    plugin = accelerator.deepspeed_plugin
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.offload_optimizer_device) == (3, 0.5, "cpu")
    assert (plugin.zero3_init_flag, plugin.zero3_save_16bit_model) == (False, True)
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("bf16", 4)
    assert not caplog.records


def test_arguments_of_the_script_win(monkeypatch):
    set_all(monkeypatch, ZERO)
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_clipping=2.0)
    accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin)
    assert accelerator.mixed_precision == "no"
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.offload_optimizer_device) == (2, 2.0, "cpu")


def test_the_own_launcher_wins(monkeypatch):
    set_all(monkeypatch, {**ZERO, "ACCELERATE_USE_FSDP": "true"})
    monkeypatch.setenv("SHARDWISE_CONFIG", json.dumps({"use_cpu": True, "mixed_precision": "fp16"}))
    accelerator = Accelerator()
    assert (accelerator.mixed_precision, accelerator.deepspeed_plugin) == ("fp16", None)


def test_a_plugin_without_the_launcher_reads_its_variables(monkeypatch):
    set_all(monkeypatch, {name: value for name, value in ZERO.items() if name != "ACCELERATE_USE_DEEPSPEED"})
    assert DeepSpeedPlugin().zero_stage == 3
    plugin = DeepSpeedPlugin(offload_optimizer_device="none")
    Accelerator(deepspeed_plugin=plugin)
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.offload_optimizer_device) == (3, 0.5, "none")


def test_a_json_of_the_launcher_is_read(monkeypatch, tmp_path, caplog):
    path = tmp_path / "ds.json"
    optimizer = {"type": "AdamW", "params": {"lr": "auto"}}
    content = {"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0, "fp16": {"enabled": True}}
    path.write_text(json.dumps({**content, "optimizer": optimizer}))
    more = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    config, notes = configuration({**ALWAYS, **more})
    assert (config.zero.zero_stage, config.zero.gradient_clipping, config.mixed_precision) == (3, 2.0, "fp16")
    assert config.zero.zero3_init_flag is True, "as accelerate does where nobody says it"
    assert config.engine.optimizer == optimizer
    assert config.engine.loss_scale.growth_interval == 1000
    assert notes == []
    with pytest.raises(ConfigError, match=r"ACCELERATE_MIXED_PRECISION is bf16, which contradicts fp16 of .*ds.json:1"):
        configuration({**ALWAYS, **more, "ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(ConfigError, match="ACCELERATE_CONFIG_DS_FIELDS: zero_stage: beside deepspeed_config_file"):
        configuration({**ALWAYS, **more, "ACCELERATE_CONFIG_DS_FIELDS": "zero3_init_flag,zero_stage"})
    with pytest.raises(ConfigError, match="ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        configuration({**more, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is 'true': FSDP is not what shardwise runs"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
        ({"ACCELERATE_FP8_BACKEND": "TE"}, "fp8 is not supported"),
        ({"ACCELERATE_FP8_FORMAT": "HYBRID"}, "ACCELERATE_FP8_FORMAT is 'HYBRID'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION: fp8 is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "bf17"}, "ACCELERATE_MIXED_PRECISION: 'bf17' is not one of"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}, "ACCELERATE_DYNAMO_BACKEND: 'tensorrt' is not one of"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE: '4' is not one of"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "much"}, "ACCELERATE_GRADIENT_CLIPPING: 'much' is not a number"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: 0 is out of range"),
    ],
)
def test_what_a_variable_asks_for_in_vain_is_an_error(monkeypatch, variables, text):
    set_all(monkeypatch, variables)
    with pytest.raises(ConfigError, match=text):
        Accelerator(cpu=True)


def test_what_has_no_effect_is_said_once(monkeypatch, caplog):
    set_all(monkeypatch, {"ACCELERATE_CPU_AFFINITY": "1", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    Accelerator(cpu=True)
    Accelerator(cpu=True)
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "ACCELERATE_CPU_AFFINITY has no effect" in said[0]
    assert "ACCELERATE_DEEPSPEED_ZERO_STAGE: no effect without ACCELERATE_USE_DEEPSPEED=true" in said[1]


def test_accumulation_is_the_variables_also_without_zero(monkeypatch):
    set_all(monkeypatch, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"})
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator._run.plan.optimizer.sharded is False


def test_blocks_are_compiled_as_the_variables_say():
    variables = {**ALWAYS, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}
    config, _ = configuration(variables)
    assert config.compiling is not None
    assert (config.compiling.dynamo_backend, config.compiling.dynamo_use_fullgraph) == ("inductor", True)


def test_the_level_of_a_logger_is_the_variables(monkeypatch):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
    root = logging.getLogger().level
    try:
        assert get_logger("shardwise.test.level").logger.level == logging.ERROR
        assert get_logger("shardwise.test.level", log_level="INFO").logger.level == logging.INFO
    finally:
        logging.getLogger().setLevel(root)


def test_the_device_may_be_the_cpu():
    assert read_variables({"ACCELERATE_TORCH_DEVICE": "cpu"}).values == {"use_cpu": True}
    assert read_variables({"ACCELERATE_TORCH_DEVICE": "cuda"}).values == {}
