"""A setting is said once, in the schema: flags, questions, comments, what ranks compare and the plugin are made of it."""

from __future__ import annotations

from typing import Annotated

import pytest

from shardwise.cli import flags
from shardwise.cli.flags import FLAGS
from shardwise.cli.questions import QUESTIONS
from shardwise.compat.deepspeed.settings import read
from shardwise.config.agreement import keys_of_schema
from shardwise.config.check import check, merged
from shardwise.config.fields import whole_number
from shardwise.config.rules import RULES
from shardwise.config.schema import SECTIONS, Config, every_setting, key_of
from shardwise.config.sections import EngineConfig
from shardwise.config.setting import ENGINE, Setting, metavar_of, setting_of
from shardwise.errors import ConfigError, PlanError
from shardwise.plan.plan import Plan
from shardwise.run.plugins import DeepSpeedPlugin


def test_a_field_of_a_section_is_a_flag_and_a_key(monkeypatch):
    class Longer(EngineConfig):
        new_setting: Annotated[int, whole_number(0), Setting("What it does.", ENGINE)] = 1

    monkeypatch.setitem(SECTIONS, ("shardwise_config",), Longer)
    (flag,) = {flag.name: flag for flag in flags._flags()}.keys() - {flag.name for flag in FLAGS}
    assert flag == "new_setting"
    assert key_of(flag) == ("shardwise_config", "new_setting")
    (info,) = (info for key, info in every_setting() if key[-1] == flag)
    assert (setting_of(info).own, setting_of(info).in_json, metavar_of(info)) == (None, True, "N")


def test_every_setting_with_a_help_has_one_flag():
    said = [key[-1] for key, info in every_setting() if setting_of(info).help]
    assert sorted(flag.name for flag in FLAGS) == sorted(said)
    assert all(flag.said.after is None or flag.said.after in said for flag in FLAGS)


def test_what_the_schema_asks_is_asked():
    asked = {key[-1] for key, info in every_setting() if setting_of(info).asked is not None}
    assert asked <= {question.name for question in QUESTIONS}


def test_a_plugin_says_what_is_in_force():
    config = merged(Config(), zero_stage=3, offload_param_device="cpu", gradient_clipping=0.5, micro_batch_size=2)
    plugin = DeepSpeedPlugin.in_force(config)
    assert plugin is not None
    assert (plugin.zero_stage, plugin.offload_param_device, plugin.train_micro_batch_size_per_gpu) == (3, "cpu", 2)
    again = DeepSpeedPlugin.in_force(plugin.merged_into(Config()))
    assert again == plugin
    assert again is not None
    assert again.deepspeed_config == plugin.deepspeed_config


def test_rules_are_of_keys_that_there_are():
    known = {*keys_of_schema(), *(".".join(section) for section in SECTIONS)}
    assert {".".join(key) for rule in RULES for key in (rule.key, *rule.also)} <= known


@pytest.mark.parametrize(("stage", "role", "device"), [(0, "optimizer", "cpu"), (2, "param", "nvme")])
def test_an_offload_is_refused_in_one_text(stage, role, device):
    zero = {"zero_stage": stage, f"offload_{role}_device": device, f"offload_{role}_nvme_path": "drive"}
    _, (problem,) = check({"distributed_type": "DEEPSPEED", "deepspeed_config": zero})
    with pytest.raises(PlanError) as told:
        Plan.from_stage(stage, **{f"offload_{role}": device})
    assert str(told.value) == f"{problem.key[-1]}: {problem.text}."


def test_a_deepspeed_json_takes_the_engines_settings_and_no_others():
    taken = [name for name, info in EngineConfig.model_fields.items() if setting_of(info).in_json]
    assert "prefetch_units" in taken
    own = {"prefetch_units": 3, "gather_with": "nccl"}
    settings = read({"train_batch_size": 2, "shardwise": own}, 1, base=Config(use_cpu=True))
    assert (settings.config.engine.prefetch_units, settings.config.engine.gather_with) == (3, "nccl")
    for name in EngineConfig.model_fields.keys() - set(taken):
        with pytest.raises(ConfigError, match=f"shardwise.{name}: unknown key; known are {', '.join(taken)}, compile"):
            read({"shardwise": {name: 1}}, 1, base=Config(use_cpu=True))
