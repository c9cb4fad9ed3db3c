"""What an Accelerator is given and what it makes of it, in one process: settings, schedulers, files, names."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import shardwise
from shardwise import (
    Accelerator,
    AcceleratorState,
    AutocastKwargs,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    GeneralTracker,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
    ProjectConfiguration,
)
from shardwise.errors import CheckpointError, ConfigError, DataError, PrepareError
from shardwise.run.accumulation import GradientState
from shardwise.run.dynamo import TorchDynamoPlugin
from shardwise.run.logging import get_logger
from shardwise.run.process import forget_run
from shardwise.run.scheduler import Rhythm, prepare_scheduler
from shardwise.weights.export import parse_size, save_weights


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fsdp_plugin": object()}, "fsdp_plugin"),
        ({"megatron_lm_plugin": object()}, "megatron_lm_plugin"),
        ({"parallelism_config": object()}, "parallelism_config"),
        ({"dynamo_backend": "tensorrt"}, "is not one of no, inductor"),
        ({"dynamo_plugin": object()}, "dynamo_plugin"),
        ({"dynamo_plugin": TorchDynamoPlugin(backend="tensorrt")}, "is not one of no, inductor"),
        ({"dynamo_plugin": TorchDynamoPlugin(), "dynamo_backend": "eager"}, "Give one of them"),
        ({"mixed_precision": "fp8"}, "fp8"),
        ({"mixed_precision": "bf17"}, "mixed_precision"),
        ({"gradient_accumulation_steps": 0}, "whole number"),
        ({"rng_types": ["xla"]}, "rng_types"),
        ({"log_with": "nonsense"}, "register_tracker_class"),
        ({"log_with": object()}, "no method `log`"),
        ({"kwargs_handlers": [object()]}, "not one of"),
        ({"kwargs_handlers": [AutocastKwargs(), AutocastKwargs()]}, "two objects"),
        (
            {
                "deepspeed_plugins": {
                    "a": DeepSpeedPlugin(mixed_precision="bf16"),
                    "b": DeepSpeedPlugin(mixed_precision="no"),
                }
            },
            "differ in mixed_precision",
        ),
        ({"deepspeed_plugins": {}}, "empty dictionary"),
        ({"deepspeed_plugins": {"a": object()}}, "no DeepSpeedPlugin"),
        ({"deepspeed_plugin": DeepSpeedPlugin(), "deepspeed_plugins": {"a": DeepSpeedPlugin()}}, "two names"),
        ({"deepspeed_plugin": DeepSpeedPlugin(enable_msamp=True)}, "fp8"),
        ({"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config="missing.json")}, "no such file"),
        ({"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config={"zero_optimisation": {"stage": 3}})}, "zero_optimization"),
        ({"deepspeed_plugin": DeepSpeedPlugin(zero_stage=5)}, "zero_stage"),
        ({"deepspeed_plugin": DeepSpeedPlugin(zero_stage=2, offload_param_device="cpu")}, "offload_param_device"),
        (
            {
                "gradient_accumulation_steps": 2,
                "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=3),
            },
            "Give one of them",
        ),
    ],
)
def test_a_setting_that_is_not_done_is_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Accelerator(cpu=True, **arguments)


def test_handlers_refuse_what_they_cannot_do():
    with pytest.raises(ConfigError, match="mpi"):
        InitProcessGroupKwargs(backend="mpi")
    with pytest.raises(ConfigError, match="data_seed"):
        DataLoaderConfiguration(data_seed=3)
    assert InitProcessGroupKwargs(timeout=timedelta(seconds=3)).to_kwargs() == {"timeout": timedelta(seconds=3)}


def test_the_configurations_settings_are_in_force(monkeypatch):
    config = {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "bf16",
        "use_cpu": True,
        "deepspeed_config": {"zero_stage": 3, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5},
    }
    monkeypatch.setenv("SHARDWISE_CONFIG", json.dumps(config))
    accelerator = Accelerator()
    plugin = accelerator.state.deepspeed_plugin
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.offload_param_device) == (3, 0.5, "none")
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 3
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator.mixed_precision == AcceleratorState().mixed_precision == "bf16"
    with accelerator.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")


def test_a_keyword_overrules_the_configuration_but_for_accumulation(monkeypatch, caplog):
    config = {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "bf16",
        "use_cpu": True,
        "deepspeed_config": {"zero_stage": 3, "gradient_accumulation_steps": 4},
    }
    monkeypatch.setenv("SHARDWISE_CONFIG", json.dumps(config))
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=2)
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 4
    assert "configuration's 4" in caplog.text


def test_a_json_file_of_a_plugin_is_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "gradient_clipping": 2}))
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=path))
    assert accelerator.deepspeed_plugin.zero_stage == 1
    assert accelerator.deepspeed_plugin.gradient_clipping == 2
    assert accelerator.mixed_precision == "bf16"


def test_the_loss_scale_is_the_one_asked_for():
    handler = GradScalerKwargs(init_scale=8.0, growth_interval=3)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[handler])
    assert accelerator.scaler.value == 8.0
    assert accelerator.scaler.growth_interval == 3
    assert Accelerator(cpu=True, mixed_precision="no").scaler is None


def test_one_process_trains_without_a_launcher():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(torch.ones(3, 2), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.num_processes == 1
    assert accelerator.gather(torch.tensor(3)).tolist() == [3]
    assert accelerator.prepare(model) is model  # as a loader and an optimizer are given back
    with pytest.raises(PrepareError, match="prepared already, by another Accelerator"):
        Accelerator(cpu=True).prepare(model)
    accelerator.free_memory()


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(CheckpointError, match="no directory was given"):
        accelerator.save_state()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        accelerator.load_state(tmp_path)
    with pytest.raises(ConfigError, match="exclude_frozen"):
        accelerator.save_state(tmp_path / "state", exclude_frozen=True)
    with pytest.raises(PrepareError, match="state_dict"):
        accelerator.register_for_checkpointing(object())


# Schedulers.


def _scheduler(cls=torch.optim.lr_scheduler.LambdaLR, **keywords):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = cls(optimizer, **keywords)
    optimizer.step()
    return scheduler


def test_a_prepared_scheduler_is_the_same_object_with_the_same_state():
    GradientState._reset_state()
    scheduler = _scheduler(lr_lambda=lambda step: 1.0 / (1 + step))
    plain = type(scheduler)
    before = scheduler.state_dict()
    prepare_scheduler(scheduler, Rhythm(3, True, lambda: False))
    assert scheduler.state_dict() == before
    assert isinstance(scheduler, plain)
    assert type(scheduler).__name__ == "LambdaLR"
    scheduler.step()
    assert scheduler.last_epoch == 3
    twin = copy.deepcopy(scheduler)
    assert type(twin) is plain
    twin.step()
    assert twin.last_epoch == 4


def test_a_scheduler_of_fixed_length_stops_at_its_end():
    GradientState._reset_state()
    keywords = {"max_lr": 1.0, "total_steps": 4}
    scheduler = _scheduler(torch.optim.lr_scheduler.OneCycleLR, **keywords)
    prepare_scheduler(scheduler, Rhythm(3, True, lambda: False))
    scheduler.step()
    scheduler.step()  # would raise past the end
    assert scheduler.last_epoch == 4


def test_a_scheduler_waits_for_the_optimizer():
    GradientState._reset_state()
    scheduler = _scheduler(torch.optim.lr_scheduler.StepLR, step_size=1)
    skipped = True
    prepare_scheduler(scheduler, Rhythm(1, True, lambda: skipped))
    scheduler.step()
    assert scheduler.last_epoch == 0
    skipped = False
    GradientState().sync_gradients = False
    count = scheduler._step_count
    scheduler.step()
    assert (scheduler.last_epoch, scheduler._step_count) == (0, count + 1)
    GradientState().sync_gradients = True
    scheduler.step()
    assert scheduler.last_epoch == 1
    plateau = _scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
    prepare_scheduler(plateau, Rhythm(1, True, lambda: False))
    plateau.step(1.0)
    plateau.step(2.0)
    assert plateau.get_last_lr()[0] < 1.0


# Files.


@pytest.mark.parametrize(("size", "wanted"), [(5, 5), ("10GB", 10**10), ("2 MiB", 2**21), ("1.5KB", 1500)])
def test_sizes_are_read(size, wanted):
    assert parse_size(size) == wanted


def test_a_wrong_size_is_refused():
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size("ten")


def test_weights_are_written_in_parts_that_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    files = save_weights(model.state_dict(), tmp_path, max_shard_size="4KB")
    assert len(files) > 3
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert [path.name for path in save_weights(model.state_dict(), tmp_path)] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# Trackers, profiles, logs.


class Notes(GeneralTracker):
    name = "notes"

    def __init__(self):
        self.lines = []

    def store_init_configuration(self, values):
        self.lines.append(values)

    def log(self, values, step=None, **kwargs):
        self.lines.append((values, step, kwargs))

    def finish(self):
        self.lines.append("end")


def test_a_tracker_of_ones_own_gets_everything():
    notes = Notes()
    accelerator = Accelerator(cpu=True, log_with=[notes])
    accelerator.init_trackers("run", config={"lr": 1})
    accelerator.log({"loss": 2}, step=3, log_kwargs={"notes": {"extra": 1}})
    assert accelerator.get_tracker("notes") is notes
    with pytest.raises(ConfigError, match="no tracker named"):
        accelerator.get_tracker("other")
    accelerator.end_training()
    assert notes.lines == [{"lr": 1}, ({"loss": 2}, 3, {"extra": 1}), "end"]


def test_a_profile_is_written(tmp_path):
    accelerator = Accelerator(cpu=True, kwargs_handlers=[ProfileKwargs(activities=["cpu"], output_trace_dir=tmp_path)])
    with accelerator.profile() as profiler:
        torch.ones(2).sum()
    assert profiler.key_averages()
    assert (tmp_path / "profile_0.json").exists()
    with pytest.raises(ConfigError, match="activities"):
        ProfileKwargs(activities=["tpu"]).build(0)


def test_a_logger_speaks_once(caplog):
    logger = get_logger("shardwise.test", log_level="INFO")
    logger.info("hello %s", "there")
    logger.info("all", main_process_only=False, in_order=True)
    logger.warning_once("careful")
    logger.warning_once("careful")
    assert [record.getMessage() for record in caplog.records] == ["hello there", "all", "careful"]
    assert caplog.records[0].funcName == "test_a_logger_speaks_once"


class Wrapped(logging.LoggerAdapter):
    def log(self, level, msg, *args, **kwargs):
        self.logger.log(level, msg, *args, **kwargs, stacklevel=3)


def test_a_logger_names_the_caller_that_a_wrapper_means(caplog):
    logger = get_logger("shardwise.test", log_level="INFO")
    logger.info("from here", stacklevel=2)
    Wrapped(logger, {}).warning("from here too")
    assert [record.funcName for record in caplog.records] == ["test_a_logger_names_the_caller_that_a_wrapper_means"] * 2


def test_a_logger_takes_its_level_from_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "debug")
    assert get_logger("shardwise.test.level").logger.level == logging.DEBUG
    assert get_logger("shardwise.test.level", log_level="ERROR").logger.level == logging.ERROR


def test_directories_follow_the_project(tmp_path):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    assert accelerator.project_dir == accelerator.logging_dir == tmp_path
    config = ProjectConfiguration(project_dir="a", logging_dir="b")
    assert Accelerator(cpu=True, project_config=config).logging_dir == "b"


# Names.


def test_every_public_name_is_there():
    for name in shardwise.__all__:
        assert getattr(shardwise, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = shardwise.nonsense
    assert "Accelerator" in dir(shardwise)


def test_the_commands_start_without_torch():
    code = "import sys, shardwise, shardwise.cli, shardwise.config.schema; sys.exit('torch' in sys.modules)"
    source = Path(shardwise.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(source)}, timeout=60, check=False)
    assert result.returncode == 0


def test_modules_of_the_front_end_leave_torch_distributed_alone():
    root = Path(shardwise.__file__).parent
    # How groups begin and end are files of their own, deepspeed.comm is torch's; the launchers run torch's agent.
    homes = ("launchers.py", "joining.py", "ranks.py", "group.py", "symmetric.py", "leaving.py", "comm.py")
    homes += ("control.py", "doubling.py")
    for path in root.rglob("*.py"):
        if path.name not in homes and path.parent.name != "cli":
            assert not re.search(r"^\s*(import|from) torch.distributed|import distributed", path.read_text(), re.M), (
                path
            )
    assert importlib.import_module("shardwise.data.prepare").skip_first_batches is shardwise.skip_first_batches


def test_a_loader_refuses_what_it_cannot_shard():
    accelerator = Accelerator(cpu=True)
    sampler = torch.utils.data.DistributedSampler(range(4), num_replicas=2, rank=0)
    with pytest.raises(DataError, match="DistributedSampler"):
        accelerator.prepare(DataLoader(range(4), sampler=sampler))
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata's own, about torch
        theirs = stateful.StatefulDataLoader(range(4))
    with pytest.raises(DataError, match="StatefulDataLoader"):
        accelerator.prepare(theirs)
    with pytest.raises(DataError, match="negative"):
        accelerator.skip_first_batches(DataLoader(range(4)), -1)


def test_a_users_own_loader_class_keeps_its_methods():
    class Own(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch * 10

        def extra(self):
            return "extra"

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(Own(range(4), batch_size=2))
    assert isinstance(loader, Own)
    assert loader.extra() == "extra"
    assert [batch.tolist() for batch in loader] == [[0, 10], [20, 30]]
    assert accelerator.prepare(loader) is loader
    assert loader.batch_sampler.batch_size == 2
    assert loader.batch_size == 2
