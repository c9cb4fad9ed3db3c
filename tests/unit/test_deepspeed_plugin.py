"""A DeepSpeedPlugin is given in each of accelerate's ways, stays open to a script, and refuses what cannot count."""

from __future__ import annotations

import base64
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.building.loading import _Switch
from shardwise.config.schema import Config
from shardwise.errors import ConfigError, PrepareError
from shardwise.run.deepspeed_plugins import get_active_deepspeed_plugin, plugin_named, select_plugin
from shardwise.run.deepspeed_words import HfDeepSpeedConfig
from shardwise.run.process import forget_run

AUTO = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")


@pytest.fixture(autouse=True)
def _no_run(monkeypatch):
    monkeypatch.delenv("SHARDWISE_CONFIG", raising=False)
    forget_run()
    yield
    forget_run()


def described(stage=2, **more):
    return {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.5, **AUTO, **more}


def accelerator_of(plugin, **keywords):
    return Accelerator(cpu=True, deepspeed_plugin=plugin, **keywords)


def prepared(accelerator, batch_size=2):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return accelerator.prepare(model, optimizer, DataLoader(torch.ones(8, 2), batch_size=batch_size))


@pytest.mark.parametrize("form", ["dict", "path", "text", "base64", "object"])
def test_a_configuration_is_taken_in_every_form(tmp_path, form):
    values = described(3, bf16={"enabled": True})
    text = json.dumps(values)
    (tmp_path / "ds.json").write_text(text)
    given = {
        "path": tmp_path / "ds.json",
        "text": text,
        "base64": base64.urlsafe_b64encode(text.encode()).decode(),
        "object": SimpleNamespace(config=values),
    }.get(form, values)
    plugin = DeepSpeedPlugin(hf_ds_config=given)
    assert plugin.zero_stage == 3
    assert plugin.hf_ds_config.is_zero3()
    accelerator = accelerator_of(plugin)
    assert accelerator.deepspeed_plugin is plugin
    assert (accelerator.mixed_precision, plugin.gradient_clipping) == ("bf16", 0.5)
    assert get_active_deepspeed_plugin(accelerator.state) is plugin


def test_a_dictionary_is_copied_and_an_objects_is_shared():
    values = described()
    before = copy.deepcopy(values)
    accelerator_of(DeepSpeedPlugin(hf_ds_config=values))
    assert values == before
    forget_run()
    shared = HfDeepSpeedConfig(values)
    plugin = DeepSpeedPlugin(hf_ds_config=shared)
    plugin.deepspeed_config["gradient_clipping"] = 2.0
    assert shared.config["gradient_clipping"] == 2.0


def test_a_field_fills_auto_and_the_configuration_holds_where_both_speak(caplog):
    values = described(2, gradient_clipping="auto")
    plugin = DeepSpeedPlugin(hf_ds_config=values, gradient_clipping=3.0, zero_stage=3)
    accelerator_of(plugin)
    assert (plugin.zero_stage, plugin.gradient_clipping) == (2, 3.0)
    assert plugin.deepspeed_config["gradient_clipping"] == 3.0
    assert "zero_stage is 3, and the DeepSpeed configuration says 2, which holds" in caplog.text


def test_what_is_written_before_the_accelerator_is_in_force():
    plugin = DeepSpeedPlugin(zero_stage=2)
    plugin.deepspeed_config["zero_optimization"]["stage"] = 3
    plugin.deepspeed_config["gradient_clipping"] = 0.25
    accelerator = accelerator_of(plugin)
    assert (plugin.zero_stage, plugin.gradient_clipping, accelerator._run.plan.parameter.sharded) == (3, 0.25, True)


def test_what_is_written_after_it_counts_in_the_next_prepare():
    plugin = DeepSpeedPlugin(hf_ds_config=described())
    accelerator = accelerator_of(plugin)
    assert plugin.is_auto("train_batch_size")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    plugin.deepspeed_config["gradient_accumulation_steps"] = 4
    plugin.deepspeed_config["gradient_clipping"] = 0.125
    prepared(accelerator)
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator._run.config.zero.gradient_clipping == 0.125
    assert plugin.deepspeed_config["train_batch_size"] == 8


def test_a_batch_size_that_a_script_writes_is_compared_and_told(caplog):
    plugin = DeepSpeedPlugin(hf_ds_config=described())
    accelerator = accelerator_of(plugin)
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 7
    prepared(accelerator)
    assert "train_micro_batch_size_per_gpu is 7, but the data loader has batches of 2" in caplog.text
    forget_run()
    promised = DeepSpeedPlugin(hf_ds_config=described(train_micro_batch_size_per_gpu=7))
    with pytest.raises(ConfigError, match="is 7, but the data loader has batches of 2"):
        prepared(accelerator_of(promised))


def test_what_is_taken_away_is_not_said_any_more():
    section = {"type": "AdamW", "params": {"lr": 0.1}}
    plugin = DeepSpeedPlugin(hf_ds_config=described(optimizer=section, train_micro_batch_size_per_gpu=7))
    accelerator = accelerator_of(plugin)
    assert accelerator._run.config.zero.gradient_clipping == 0.5
    for key in ("optimizer", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        del plugin.deepspeed_config[key]
    prepared(accelerator)
    engine = accelerator._run.config.engine
    assert (engine.optimizer, engine.micro_batch_size, accelerator._run.config.zero.gradient_clipping) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize(("smallest", "found"), [(True, 2), (False, 4)])
def test_the_loader_that_counts_is_the_smallest_or_the_largest(smallest, found):
    plugin = DeepSpeedPlugin(hf_ds_config=described(), is_train_batch_min=smallest)
    accelerator = accelerator_of(plugin)
    accelerator.prepare(
        nn.Linear(2, 1), DataLoader(torch.ones(8, 2), batch_size=2), DataLoader(torch.ones(8, 2), batch_size=4)
    )
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == found


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("bf16", {"enabled": True}, "changed after Accelerator"),
        ("fp16", {"enabled": True, "loss_scale": 8}, "changed after Accelerator"),
        ("zero_optimisation", {"stage": 3}, "did you mean zero_optimization"),
        ("zero_optimization", {"stage": 7}, "7 is not one of"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps"),
        ("amp", {"enabled": True}, "apex"),
    ],
)
def test_what_is_written_and_cannot_count_is_refused_in_prepare(key, value, text):
    plugin = DeepSpeedPlugin(hf_ds_config=described())
    accelerator = accelerator_of(plugin)
    plugin.deepspeed_config[key] = value
    with pytest.raises(ConfigError, match=text):
        prepared(accelerator)


def test_a_precision_that_contradicts_the_configurations_is_refused():
    plugin = DeepSpeedPlugin(hf_ds_config=described(bf16={"enabled": True}))
    with pytest.raises(ConfigError, match="mixed_precision is fp16, and the DeepSpeed configuration enables bf16"):
        accelerator_of(plugin, mixed_precision="fp16")


def test_an_auto_precision_is_the_accelerators():
    plugin = DeepSpeedPlugin(hf_ds_config=described(bf16={"enabled": "auto"}))
    accelerator = accelerator_of(plugin, mixed_precision="bf16")
    assert accelerator.mixed_precision == "bf16"
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}
    assert plugin.deepspeed_config["fp16"] == {"enabled": False}


def test_a_precision_is_written_by_the_plugin_too():
    plugin = DeepSpeedPlugin(hf_ds_config=described(bf16={"enabled": "auto"}))
    plugin.set_mixed_precision("bf16")
    assert plugin.get_value("bf16.enabled") is True
    assert accelerator_of(plugin).mixed_precision == "bf16"
    with pytest.raises(ConfigError, match="enables bf16"):
        plugin.set_mixed_precision("fp16")


def test_auto_values_are_filled_and_the_others_compared():
    plugin = DeepSpeedPlugin(hf_ds_config=described(optimizer={"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6}}))
    given = {"optimizer.params.lr": 0.5, "optimizer.params.eps": 1e-8, **dict.fromkeys(AUTO, 2)}
    with pytest.raises(ConfigError, match=r"optimizer.params.eps is 1e-06 in the DeepSpeed configuration, and 1e-08"):
        plugin.deepspeed_config_process(**given)
    assert plugin.deepspeed_config["optimizer"]["params"]["lr"] == 0.5
    assert not plugin.is_auto("train_batch_size")
    plugin.deepspeed_config["optimizer"]["params"]["lr"] = "auto"
    with pytest.raises(ConfigError, match="nothing says what it is"):
        plugin.deepspeed_config_process(must_match=False)
    assert plugin.get_value("no.such.key", "default") == "default"


def test_building_without_memory_is_switched_for_a_block_and_back():
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True)
    accelerator_of(plugin)
    assert (_Switch.by_flag, plugin.is_zero3_init_enabled()) == (True, True)
    with plugin.zero3_init_context_manager(enable=False):
        assert (_Switch.by_flag, plugin.is_zero3_init_enabled()) == (False, False)
    assert (_Switch.by_flag, plugin.is_zero3_init_enabled()) == (True, True)
    with pytest.raises(KeyError), plugin.zero3_init_context_manager(enable=False):
        raise KeyError
    assert _Switch.by_flag
    forget_run()
    lower = DeepSpeedPlugin(zero_stage=2)
    accelerator_of(lower)
    with lower.zero3_init_context_manager(enable=True):
        assert not _Switch.by_flag
    assert not _Switch.by_flag


def test_classes_of_experts_must_be_there():
    plugin = DeepSpeedPlugin(zero_stage=3, transformer_moe_cls_names="Linear, Expert")
    with pytest.raises(PrepareError, match="Expert: this Sequential has no module"):
        plugin.set_moe_leaf_modules(nn.Sequential(nn.Linear(1, 1)))
    DeepSpeedPlugin(transformer_moe_cls_names="Linear").set_moe_leaf_modules(nn.Sequential(nn.Linear(1, 1)))


def test_the_first_of_several_is_in_force_until_another_is_selected():
    plugins = {"student": DeepSpeedPlugin(zero_stage=2), "teacher": DeepSpeedPlugin(zero_stage=3)}
    accelerator = accelerator_of(plugins)
    assert accelerator.deepspeed_plugins is plugins
    assert accelerator.deepspeed_plugin is plugins["student"]
    student = accelerator.prepare(nn.Linear(2, 1))
    select_plugin(accelerator.deepspeed_plugins, "teacher")
    assert get_active_deepspeed_plugin(accelerator.state) is plugins["teacher"]
    assert [plugin.selected for plugin in plugins.values()] == [False, True]
    teacher = accelerator.prepare(nn.Linear(2, 1))
    select_plugin(accelerator.deepspeed_plugins, "student")
    again = accelerator.prepare(nn.Linear(2, 1))
    plans = {id(entry.model): entry.sharded.plan.parameter.sharded for entry in accelerator._run.models}
    assert [plans[id(model)] for model in (student, teacher, again)] == [False, True, False]
    with pytest.raises(ConfigError, match="no DeepSpeedPlugin 'third'; known are student, teacher"):
        plugin_named(plugins, "third")
    with pytest.raises(ConfigError, match="select_deepspeed_plugin"):
        plugins["student"].select()
    with pytest.raises(NotImplementedError):
        plugins["student"].selected = True


def test_plugins_of_one_accelerator_share_the_group_that_shards():
    assert DeepSpeedPlugin(zero_stage=3).shard_group == "world"
    assert DeepSpeedPlugin(zero_stage=3, shard_group="machine").merged_into(Config()).zero.shard_group == "machine"
    described = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 3, "mics_shard_size": 2}})
    assert described.merged_into(Config()).zero.shard_group == described.shard_group == 2
    hpz = DeepSpeedPlugin(zero_stage=3, shard_group="machine", optimizer_shard_group="world").merged_into(Config())
    assert (hpz.zero.shard_group, hpz.zero.optimizer_shard_group) == ("machine", "world")
    plugins = {name: DeepSpeedPlugin(zero_stage=3, shard_group=group) for name, group in (("a", 1), ("b", "world"))}
    with pytest.raises(ConfigError, match="'a' and 'b' differ in shard_group, which an Accelerator has once"):
        Accelerator(cpu=True, deepspeed_plugins=plugins)


def test_a_run_without_zero_has_no_active_plugin():
    with pytest.raises(ConfigError, match="no ZeRO settings"):
        get_active_deepspeed_plugin(Accelerator(cpu=True).state)


def test_every_argument_of_accelerates_plugin_is_one_here():
    dataclasses = pytest.importorskip("accelerate.utils.dataclasses")
    from dataclasses import fields

    theirs = [item.name for item in fields(dataclasses.DeepSpeedPlugin)]
    ours = [item.name for item in fields(DeepSpeedPlugin)]
    assert ours[: len(theirs)] == theirs
    members = {name for name in vars(dataclasses.DeepSpeedPlugin) if not name.startswith("_")}
    assert members <= set(dir(DeepSpeedPlugin()))
